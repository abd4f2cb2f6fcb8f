"""CPU images run every worker once, on as many threads as asked, from any thread and after fork; idle threads sleep."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flashinfer_core import _host, compiler, headers

KERNEL = """
#include <sys/syscall.h>
#include <unistd.h>
#include "core/cpu_entry.h"
struct VisitParams {
  int32_t* visits;     // [workers], counts calls
  int32_t* threads;    // [workers], who came
  const int32_t* naps;  // [workers], microseconds
};
template <int kAdd>
void visit(const VisitParams& p, int32_t worker, int32_t num_workers) {
  if (worker < 0 || worker >= num_workers) return;
  volatile char tile[500 << 10];  // kernels keep their tiles on the stack
  tile[0] = tile[sizeof(tile) - 1] = 1;
  __atomic_fetch_add(p.visits + worker, kAdd, __ATOMIC_RELAXED);
  p.threads[worker] = static_cast<int32_t>(syscall(SYS_gettid));
  if (p.naps[worker] > 0) usleep(static_cast<unsigned>(p.naps[worker]));
}
extern "C" void flashinfer_entry(const void* params, int32_t worker, int32_t num_workers) {
  flashinfer::enter<&visit<ADD>>(params, worker, num_workers);
}
"""


class VisitParams(ctypes.Structure):
    """What the kernel above takes."""

    _fields_ = (
        ("visits", ctypes.c_void_p),
        ("threads", ctypes.c_void_p),
        ("naps", ctypes.c_void_p),
    )


class Visit:
    """One call's arrays."""

    def __init__(self, workers: int, **naps: int) -> None:
        self.visits, self.threads, self.naps = (np.zeros(workers, dtype=np.int32) for _ in range(3))
        for worker, nap in naps.items():
            self.naps[int(worker[1:])] = nap
        self.params = VisitParams(*(array.ctypes.data for array in (self.visits, self.threads, self.naps)))

    def launch(self, function: _host.CpuFunction, threads: int) -> Visit:
        function.launch(self.params, len(self.visits), threads)
        return self


def build(folder: Path, source: str, *flags: str) -> bytes:
    (folder / "image.cpp").write_text(source)
    includes = [f"-I{root}" for root in headers.roots(headers.package_folder("flashinfer_core") / "kernels")]
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-nodefaultlibs", "-fvisibility=hidden", *flags]
    command = [*compiler.cxx().split(), *options, *includes, "image.cpp", "-o", "image.so", "-lc"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "image.so").read_bytes()


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("image"), KERNEL, "-DADD=1")


@pytest.fixture(scope="module")
def visit(payload: bytes) -> _host.CpuFunction:
    return _host.cpu_load(payload)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("workers", [0, 1, 2, 7, 1000])
def test_every_worker_runs_once(visit: _host.CpuFunction, workers: int, threads: int) -> None:
    for _ in range(50):
        call = Visit(workers).launch(visit, threads)
        assert (call.visits == 1).all()
        assert len(set(call.threads.tolist())) <= min(workers, threads)


def test_the_caller_works_and_others_join_it(visit: _host.CpuFunction) -> None:
    call = Visit(40, **{f"w{worker}": 10_000 for worker in range(40)}).launch(visit, 4)
    used = set(call.threads.tolist())
    assert threading.get_native_id() in used
    assert len(used) == 4


def test_a_caller_with_a_small_stack_leaves_all_work_to_others(visit: _host.CpuFunction) -> None:
    calls: list[Visit] = []
    before = threading.stack_size(128 << 10)
    try:
        thread = threading.Thread(target=lambda: calls.extend(Visit(7).launch(visit, n) for n in (1, 2, 4)))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert len(calls) == 3
    for call in calls:
        assert (call.visits == 1).all()
        assert thread.native_id not in call.threads


def test_a_long_worker_leaves_the_others_to_other_threads(visit: _host.CpuFunction) -> None:
    call = Visit(200, w0=300_000).launch(visit, 2)
    assert (call.visits == 1).all()
    assert call.threads[0] not in call.threads[1:]


def test_several_python_threads_launch_at_once(visit: _host.CpuFunction) -> None:
    failures = []

    def work() -> None:
        for round_ in range(100):
            call = Visit(1 + round_).launch(visit, 4)
            if not (call.visits == 1).all():
                failures.append(call.visits)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_python_runs_meanwhile(visit: _host.CpuFunction) -> None:
    call = Visit(1, w0=300_000)
    thread = threading.Thread(target=call.launch, args=(visit, 1))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()  # reached only because the launch holds no lock of the interpreter
    thread.join()


def test_idle_threads_use_no_time(visit: _host.CpuFunction) -> None:
    Visit(64).launch(visit, 8)
    assert _host.pool_threads() >= 7
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_images_of_one_build_stay_apart(tmp_path: Path, payload: bytes) -> None:
    files = len(os.listdir("/proc/self/fd"))
    loaded = {1: _host.cpu_load(payload)}
    for add in (2, 3):
        loaded[add] = _host.cpu_load(build(tmp_path, KERNEL, f"-DADD={add}"))
    assert len(os.listdir("/proc/self/fd")) == files
    for add, function in loaded.items():
        assert (Visit(3).launch(function, 1).visits == add).all()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        pytest.param(b"no shared object", "dlopen failed", id="rubbish"),
        pytest.param(b"", "dlopen failed", id="empty"),
    ],
)
def test_a_bad_image_is_an_error(source: bytes, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        _host.cpu_load(source)


def test_an_image_without_entry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no symbol flashinfer_entry"):
        _host.cpu_load(build(tmp_path, 'extern "C" void other() {}\n'))


def test_bad_arguments(visit: _host.CpuFunction) -> None:
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        visit.launch(VisitParams(), -1, 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        visit.launch(VisitParams(), 1, 0)
    with pytest.raises(TypeError):
        visit.launch("text", 1, 1)  # type: ignore[arg-type]


IN_A_PROCESS = """
import os, resource, sys, threading
sys.path[:0] = [{tests!r}]
from test_executor import Visit
from flashinfer_core import _host
visit = _host.cpu_load(open({image!r}, "rb").read())
def check(threads=4):
    assert (Visit(100).launch(visit, threads).visits == 1).all()
def forked():
    child = os.fork()
    if child == 0:
        started = _host.pool_threads()
        check()
        os._exit(0 if started == 0 and _host.pool_threads() == 3 else 1)
    return os.waitpid(child, 0)[1]
"""


def run_script(tmp_path: Path, payload: bytes, script: str) -> None:
    image = tmp_path / "visit.so"
    image.write_bytes(payload)
    prelude = IN_A_PROCESS.format(tests=str(Path(__file__).parent), image=str(image))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", prelude + script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_a_forked_child_starts_its_own_threads(tmp_path: Path, payload: bytes) -> None:
    run_script(tmp_path, payload, "check()\nassert forked() == 0\ncheck()\n")


def test_a_fork_in_the_middle_of_launches(tmp_path: Path, payload: bytes) -> None:
    script = """
stop = threading.Event()
def work():
    while not stop.is_set(): check()
workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers: worker.start()
results = [forked() for _ in range(30)]
stop.set()
for worker in workers: worker.join()
assert results == [0] * 30, results
"""
    run_script(tmp_path, payload, script)


def test_a_system_that_refuses_threads_is_served_by_those_there_are(tmp_path: Path, payload: bytes) -> None:
    script = """
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (10 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
check(64)
assert _host.pool_threads() < 63
"""
    run_script(tmp_path, payload, script)
