#include "cpu_function.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace flashinfer::host {
namespace {

constexpr char kEntry[] = "flashinfer_entry";
constexpr unsigned kCloseOnExec = 1;  // MFD_CLOEXEC; glibc before 2.27 has neither the name nor the function

[[noreturn]] void fail(const std::string& operation, const std::string& why) {
  throw std::runtime_error("loading a CPU image: " + operation + " failed: " + why);
}

class File {
 public:
  explicit File(int number) : number_(number) {}
  File(File&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  File& operator=(File&&) = delete;
  ~File() {
    if (number_ >= 0) close(number_);
  }
  int number() const { return number_; }

 private:
  int number_;
};

File file_in_memory(const char* bytes, size_t left) {
  File file(static_cast<int>(syscall(SYS_memfd_create, "flashinfer-image", kCloseOnExec)));
  if (file.number() < 0) fail("memfd_create", std::strerror(errno));
  while (left > 0) {
    const ssize_t written = write(file.number(), bytes, left);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("write", std::strerror(errno));
    bytes += written;
    left -= static_cast<size_t>(written);
  }
  return file;
}

// dlopen recognises a library by its path, and the number of a closed file is soon used again. So the file is
// duplicated until its path is that of no library that is already open.
void* open_library(File first) {
  std::vector<File> files;
  files.push_back(std::move(first));
  for (;;) {
    const std::string path = "/proc/self/fd/" + std::to_string(files.back().number());
    void* known = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (known == nullptr) {
      dlerror();
      void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library == nullptr) fail("dlopen", dlerror());
      return library;
    }
    dlclose(known);
    File next(dup(files.back().number()));
    if (next.number() < 0) fail("dup", std::strerror(errno));
    files.push_back(std::move(next));
  }
}

}  // namespace

void CpuFunction::Close::operator()(void* library) const { dlclose(library); }

CpuFunction::CpuFunction(const void* payload, size_t bytes)
    : library_(open_library(file_in_memory(static_cast<const char*>(payload), bytes))),
      entry_(reinterpret_cast<CpuEntryPoint>(dlsym(library_.get(), kEntry))) {
  if (entry_ == nullptr) fail("dlsym", std::string("no symbol ") + kEntry + " in the image");
}

}  // namespace flashinfer::host
