"""Loading and launching through the driver, against a libcuda.so.1 of our own that records what it is asked.

The driver is found once for a process, so each case runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fake_driver import FakeDriver
from flashinfer_core import compiler

PRELUDE = """
import ctypes, struct, threading
from flashinfer_core import _host
fake = ctypes.CDLL("libcuda.so.1")
params = struct.pack("<QQ", 0xABCD, 0)
def load(shared_bytes=100 << 10, threads=128):
    return _host.cuda_load(b".version 8.0", "kernel", 0, threads, shared_bytes)
"""
LOADED = [
    "cuInit",
    "cuDeviceGet 0",
    "cuThreadExchangeStreamCaptureMode 2",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent 100",
    "cuModuleLoadDataEx .version 8.0",
    "cuModuleGetFunction 200 kernel",
    "cuFuncSetAttribute 8 102400",
    "cuFuncSetAttribute 9 100",
    "cuFuncLoad",
    "cuFuncGetAttribute 4",
    "cuFuncGetAttribute 1",
    "cuOccupancy 128 102400",
    "cuDeviceGetAttribute 16",
    "cuFuncGetParamInfo 0",
    "cuCtxPopCurrent",
    "cuThreadExchangeStreamCaptureMode 0",
]
LAUNCHED = "300 grid 7 1 1 block 128 1 1 shared 102400 stream 55 attributes none params abcd"


class Fake:
    """A driver, and the calls that the last script made."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.driver = FakeDriver(folder, *flags)
        self.calls: list[str] = []

    def run(self, script: str, **environment: str) -> str:
        """Run `script` with this driver, note its calls, and return what it prints."""
        self.driver.forget()
        printed = run(PRELUDE + textwrap.dedent(script), **self.driver.variables, **environment)
        self.calls = self.driver.calls
        return printed


def run(script: str, **environment: str) -> str:
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    return Fake(tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    return Fake(tmp_path_factory.mktemp("old"), "-DOLD_DRIVER")


def test_no_driver_is_a_typed_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")  # also hides the machine's own
    script = """
from flashinfer_core import _host
for call in (_host.driver_version, _host.device_count, lambda: _host.cuda_load(b"", "kernel", 0, 32, 0)):
    try:
        call()
    except _host.CudaUnavailableError as error:
        assert isinstance(error, _host.CudaError) and isinstance(error, RuntimeError)
        print(error)
"""
    printed = run(script, LD_LIBRARY_PATH=str(tmp_path)).splitlines()
    assert len(printed) == 3
    assert all(line.startswith("the CUDA driver could not be loaded: ") for line in printed)


def test_a_driver_that_lacks_a_function_is_unavailable(tmp_path: Path) -> None:
    empty = tmp_path / "empty.cpp"
    empty.touch()
    subprocess.run([*compiler.cxx().split(), "-shared", str(empty), "-o", str(tmp_path / "libcuda.so.1")], check=True)
    script = """
from flashinfer_core import _host
try:
    _host.driver_version()
except _host.CudaUnavailableError as error:
    print(error)
"""
    assert run(script, LD_LIBRARY_PATH=str(tmp_path)) == "libcuda.so.1 has no function cuInit"


def test_importing_opens_no_driver(fake: Fake) -> None:
    fake.run("")
    assert fake.calls == []


def test_facts(fake: Fake) -> None:
    printed = fake.run("print(_host.driver_version(), _host.device_count(), _host.device_facts(0))")
    assert printed == (
        "12040 1 {'name': 'Fake H100', 'capability': (9, 0), 'sm_count': 132, 'shared_optin_bytes': 232448, "
        "'total_memory': 85899345920, 'l2_bytes': 52428800, 'uuid': '00112233-4455-6677-8899-aabbccddeeff'}"
    )


def test_a_driver_without_gpu_counts_none(fake: Fake) -> None:
    assert fake.run("print(_host.device_count())", FAKE_CUDA_FAIL="cuInit", FAKE_CUDA_ERROR="100") == "0"


def test_loading_is_eager_and_leaves_the_thread_as_it_was(fake: Fake) -> None:
    printed = fake.run("f = load(); print(f.registers, f.shared_bytes, f.max_workers); del f")
    assert printed == f"96 {(100 << 10) + 1024} 264"
    assert fake.calls == LOADED  # and nothing is unloaded: a graph may still hold the function


@pytest.mark.parametrize(
    ("shared_bytes", "calls"),
    [(0, []), (48 << 10, ["cuFuncSetAttribute 9 100"])],
    ids=["none", "48k"],
)
def test_shared_memory_is_asked_for_only_where_needed(fake: Fake, shared_bytes: int, calls: list[str]) -> None:
    fake.run(f"load({shared_bytes})")
    assert [call for call in fake.calls if call.startswith("cuFuncSetAttribute")] == calls


def test_a_launch_pushes_the_context_where_another_is_current(fake: Fake) -> None:
    fake.run("load().launch(params, workers=7, stream=0x55)")
    assert fake.calls[len(LOADED) :] == [
        "cuCtxGetCurrent",
        "cuCtxPushCurrent 100",
        f"cuLaunchKernelEx {LAUNCHED}",
        "cuCtxPopCurrent",
    ]


def test_a_launch_in_the_current_context_pushes_nothing(fake: Fake) -> None:
    fake.run("f = load(); fake.cuCtxPushCurrent_v2(ctypes.c_void_p(0x100)); f.launch(params, 7, 0x55)")
    assert fake.calls[len(LOADED) + 1 :] == ["cuCtxGetCurrent", f"cuLaunchKernelEx {LAUNCHED}"]


def test_programmatic_serialization_is_an_attribute_of_the_launch(fake: Fake) -> None:
    fake.run("load().launch(params, workers=7, stream=0x55, programmatic=True)")
    assert fake.calls[-2] == f"cuLaunchKernelEx {LAUNCHED.replace('attributes none', 'attributes 6=1')}"


def test_a_bound_launch_brings_addresses_to_each_kernel(fake: Fake) -> None:
    fake.run(
        """
        f = load()
        bound = _host.bind([(f, params, 7, False), (f, params, 3, True)], [[(0, 0)], [(1, 0), (0, 8)]])
        bound.launch((0xabc, 0xdef), 0x55)
        """
    )
    launches = [call for call in fake.calls if "Launch" in call]
    first = LAUNCHED.replace("abcd", "abc")
    second = LAUNCHED.replace("abcd", "def").replace("grid 7", "grid 3").replace("attributes none", "attributes 6=1")
    assert launches == [f"cuLaunchKernelEx {first}", f"cuLaunchKernelEx {second}"]


def test_a_capture_mode_is_restored(fake: Fake) -> None:
    fake.run("fake.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(1))); load()")
    exchanged = [call for call in fake.calls if call.startswith("cuThreadExchange")]
    assert exchanged == [f"cuThreadExchangeStreamCaptureMode {mode}" for mode in (1, 2, 1)]


@pytest.mark.parametrize("programmatic", [False, True])
def test_an_old_driver_loads_and_launches_without_attributes(old: Fake, programmatic: bool) -> None:
    old.run(f"load().launch(params, 7, 0x55, {programmatic})")
    assert old.calls[-2] == "cuLaunchKernel 300 grid 7 block 128 shared 102400 stream 55 params abcd"
    assert "cuFuncLoad" not in old.calls


CATCH = """
try:
    load().launch(params, 7)
except _host.CudaError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("failing", "number", "text", "undone"),
    [
        (
            "cuModuleLoadDataEx",
            218,
            "cuModuleLoadData failed: CUDA_ERROR_INVALID_PTX (218): a PTX JIT compilation failed\n"
            "ptxas: line 3; syntax error",
            ["cuCtxPopCurrent", "cuDevicePrimaryCtxRelease", "cuThreadExchangeStreamCaptureMode 0"],
        ),
        (
            "cuModuleGetFunction",
            500,
            "cuModuleGetFunction failed: unknown CUDA error (500): no description\nasked for kernel kernel",
            ["cuModuleUnload", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease", "cuThreadExchangeStreamCaptureMode 0"],
        ),
        (
            "cuLaunchKernelEx",
            701,
            "cuLaunchKernelEx failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701): too many resources requested",
            ["cuCtxPopCurrent"],
        ),
    ],
    ids=["module", "function", "launch"],
)
def test_an_error_names_its_call_and_undoes_the_rest(
    fake: Fake, failing: str, number: int, text: str, undone: list[str]
) -> None:
    assert fake.run(CATCH, FAKE_CUDA_FAIL=failing, FAKE_CUDA_ERROR=str(number)) == text
    position = next(i for i, call in enumerate(fake.calls) if call.split()[0] == failing)
    assert fake.calls[position + 1 :] == undone


def test_a_kernel_that_does_not_fit_is_an_error(fake: Fake) -> None:
    printed = fake.run("try: load(threads=2048)\nexcept _host.CudaError as error: print(error)")
    assert printed.startswith("the kernel does not fit on the device: 2048 threads of 96 registers")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("f.launch(params, 0)", "workers must be at least 1, got 0"),
        ("f.launch(params[:8], 1)", "the kernel takes 16 bytes of parameters, got 8"),
        ("_host.bind([(f, params[:8], 1, False)], [])", "the kernel takes 16 bytes of parameters, got 8"),
        ("_host.bind([(f, params, 1, False)], [[(0, 12)]])", "an address belongs at byte 12, beyond the parameters"),
        ("load(-1)", "shared_bytes must not be negative, got -1"),
        ("load(0, 0)", "threads must be at least 1, got 0"),
    ],
    ids=["workers", "params", "bound-params", "bound-address", "shared_bytes", "threads"],
)
def test_bad_arguments_launch_nothing(fake: Fake, call: str, text: str) -> None:
    assert fake.run(f"f = load()\ntry: {call}\nexcept ValueError as error: print(error)") == text
    assert fake.calls == LOADED


def test_threads_load_and_launch_at_once(fake: Fake) -> None:
    fake.run(
        """
        f = load()
        def work():
            for _ in range(20):
                load()
                f.launch(params, 7, 0x55)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        """
    )
    assert fake.calls.count(f"cuLaunchKernelEx {LAUNCHED}") == 160
    assert fake.calls.count("cuCtxPushCurrent 100") == fake.calls.count("cuCtxPopCurrent") == 1 + 2 * 160
