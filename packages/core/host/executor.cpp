#include "executor.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

namespace flashinfer::host {
namespace {

constexpr size_t kStackBytes = size_t(4) << 20;  // kernels keep their tiles there, whatever `ulimit -s` says
constexpr size_t kLeastStackBytes = size_t(2) << 20;
constexpr int32_t kMaxThreads = 1024;
constexpr int32_t kWakesPerThread = 2;  // each woken thread wakes two more: a tree, not a queue at the caller
constexpr auto kTail = std::chrono::microseconds(100);  // helpers start later than the caller by less

struct Job {
  CpuEntryPoint entry;
  const void* params;
  int32_t workers;
  std::atomic<int32_t> next{0};
  std::atomic<int32_t> active{0};  // helpers inside; grows only under the pool's mutex
  int32_t wanted;                  // helpers that may still join
  std::condition_variable done;

  Job(CpuEntryPoint e, const void* p, int32_t w, int32_t helpers) : entry(e), params(p), workers(w), wanted(helpers) {}

  void drain() {
    for (;;) {
      const int32_t worker = next.fetch_add(1, std::memory_order_relaxed);
      if (worker >= workers) return;
      entry(params, worker, workers);
    }
  }

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= workers; }
};

// Whether kernels may run on the calling thread's stack: `threading.stack_size` can make it as small as 32 KB.
bool has_room() {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return true;
  void* lowest = nullptr;
  size_t size = 0;
  pthread_attr_getstack(&attributes, &lowest, &size);
  pthread_attr_destroy(&attributes);
  const char here = 0;
  return &here - static_cast<const char*>(lowest) >= static_cast<ptrdiff_t>(kLeastStackBytes);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // The caller takes part, unless its stack is too small and there are helpers to do all.
  void run(Job& job, bool caller_works) {
    int32_t wanted;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      grow(job.wanted);
      job.wanted = std::min(job.wanted, threads_);
      if (job.wanted > 0) jobs_.push_back(&job);
      wanted = job.wanted;
    }
    wake(wanted);
    if (caller_works || wanted == 0) {
      job.drain();
      leave(job);
    } else {
      await(job);
    }
  }

  int32_t threads() {
    std::lock_guard<std::mutex> lock(mutex_);
    return threads_;
  }

 private:
  // Without the mutex, which those who wake up want next.
  void wake(int32_t wanted) {
    for (int32_t i = 0; i < std::min(wanted, kWakesPerThread); ++i) work_.notify_one();
  }

  // With the mutex held. Where the system refuses another thread, those that exist do the work.
  void grow(int32_t wanted) {
    if (threads_ >= wanted) return;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStackBytes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;  // signals belong to the interpreter's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; threads_ < wanted; ++threads_) {
      if (pthread_create(&thread, &attributes, &Pool::main, this) != 0) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
  }

  // A thread pool that shares the process may spin between its own calls, as OpenMP's does for milliseconds. From Linux
  // 6.12 a thread that asks for short slices runs before one that does not; older kernels ignore the wish.
  static void ask_for_short_slices() {
    struct {
      uint32_t size, policy;
      uint64_t flags;
      int32_t nice;
      uint32_t priority;
      uint64_t runtime, deadline, period;
    } attributes = {};
    if (sched_getscheduler(0) != SCHED_OTHER) return;
    attributes.size = sizeof(attributes);
    attributes.nice = getpriority(PRIO_PROCESS, 0);
    attributes.runtime = 100'000;  // nanoseconds, the least that is granted
    syscall(SYS_sched_setattr, 0, &attributes, 0);
  }

  static void* main(void* self) {
    ask_for_short_slices();
    static_cast<Pool*>(self)->serve();
    return nullptr;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      if (--job.wanted == 0 || job.exhausted()) jobs_.pop_front();
      if (job.exhausted()) continue;
      job.active.fetch_add(1, std::memory_order_relaxed);
      const int32_t wanted = job.wanted;
      lock.unlock();
      wake(wanted);
      job.drain();
      lock.lock();
      // The caller takes the mutex before it frees the job.
      if (job.active.fetch_sub(1, std::memory_order_release) == 1) job.done.notify_one();
    }
  }

  // Waits until helpers have done all of the job.
  void await(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    job.done.wait(lock, [&job] { return job.exhausted() && job.active.load(std::memory_order_acquire) == 0; });
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
  }

  // Closes the job to helpers and waits for those inside: briefly awake, for they end about now, then parked.
  void leave(Job& job) {
    const auto deadline = std::chrono::steady_clock::now() + kTail;
    while (job.active.load(std::memory_order_acquire) != 0 && std::chrono::steady_clock::now() < deadline) relax();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    job.done.wait(lock, [&job] { return job.active.load(std::memory_order_acquire) == 0; });
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Job*> jobs_;
  int32_t threads_ = 0;
};

// A child of fork has none of its parent's threads, and may have been born while the mutex was held: it forgets the
// pool. The pool is never destroyed, because its threads may be parked in it until the process is gone.
std::atomic<Pool*> the_pool{nullptr};

void forget_pool() { the_pool.store(nullptr); }

Pool& pool() {
  static const int watched = pthread_atfork(nullptr, nullptr, forget_pool);
  static_cast<void>(watched);
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void execute(CpuEntryPoint entry, const void* params, int32_t workers, int32_t threads) {
  thread_local const bool roomy = has_room();
  const int32_t helpers = std::min({threads, workers, kMaxThreads}) - (roomy ? 1 : 0);
  Job job(entry, params, workers, helpers);
  if (helpers > 0) {
    pool().run(job, roomy);
  } else {
    job.drain();
  }
}

int32_t pool_threads() {
  Pool* current = the_pool.load(std::memory_order_acquire);
  return current == nullptr ? 0 : current->threads();
}

}  // namespace flashinfer::host
