"""Importing costs little and does nothing: no file, no socket, no GPU, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flashinfer_core
from fake_driver import FakeDriver

# Times an import after `first`, and lists what the process did meanwhile that others could notice.
PROBE = """
import json, sys, time
first, name = sys.argv[1:]
if first:
    __import__(first)
done = []
def watch(event, arguments):
    if "__pycache__" in str(arguments):
        return  # Python's own doing, and installers do it beforehand
    if event == "open":
        mode, flags = arguments[1:]
        by_name = not isinstance(arguments[0], int)  # what is opened by number was seen when it was opened by name
        if by_name and ((mode and set(mode) & set("wax+")) or flags & 3):
            done.append([event, str(arguments[0])])
    elif event.split(".")[0] in ("socket", "subprocess", "shutil", "tempfile") or event in (
        "os.mkdir", "os.rename", "os.remove", "os.system", "urllib.Request"
    ) or (event == "ctypes.dlopen" and arguments[0]):
        done.append([event, str(arguments)])
sys.addaudithook(watch)
began = time.perf_counter()
__import__(name)
seconds = time.perf_counter() - began
with open("/proc/self/maps") as maps:
    libraries = maps.read()
print(json.dumps({
    "seconds": seconds, "done": done, "torch": "torch" in sys.modules, "libcuda": "libcuda.so" in libraries,
    "host": "flashinfer_core._host" in sys.modules,
}))
"""


def _probe(name: str, *, after: str = "", options: tuple[str, ...] = (), path: str = "") -> dict[str, Any]:
    command = [sys.executable, *options, "-c", PROBE, after, name]
    environment = {**os.environ, "PYTHONPATH": path or os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _fast(name: str, **how: Any) -> dict[str, Any]:
    """Probe again where compiling the modules or a busy machine made the first import slow."""
    for _ in range(5):
        result = _probe(name, **how)
        if result["seconds"] < 0.1:
            break
    return result


def _brought(result: dict[str, Any]) -> list[str]:
    return [name for name in ("torch", "libcuda", "host") if result[name]]


@pytest.fixture
def core_alone(tmp_path: Path) -> str:
    """Make a folder that holds flashinfer_core and nothing else."""
    (tmp_path / "flashinfer_core").symlink_to(Path(flashinfer_core.__file__).parent)
    return str(tmp_path)


def test_core_needs_no_torch_and_does_nothing(core_alone: str) -> None:
    result = _fast("flashinfer_core", options=("-S",), path=core_alone)
    assert result["seconds"] < 0.1
    assert result["done"] == []
    assert _brought(result) == []


@pytest.mark.parametrize("module", ["compiler", "build", "images", "kernel", "params", "doctor", "cli", "nvrtc"])
def test_parts_of_core_need_neither_torch_nor_the_host_extension(module: str, core_alone: str) -> None:
    result = _probe(f"flashinfer_core.{module}", options=("-S",), path=core_alone)
    assert result["done"] == []
    assert _brought(result) == []


PACKAGES = ("flashinfer", "flashinfer_attention", "flashinfer_page", "flashinfer_lora")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_add_little_to_torch_and_do_nothing(package: str) -> None:
    result = _fast(package, after="torch")
    assert result["seconds"] < 0.1
    assert result["done"] == []
    assert {"libcuda", "host"}.isdisjoint(_brought(result))


@pytest.mark.parametrize("module", ["flashinfer_core", *PACKAGES])
def test_importing_asks_the_driver_nothing(module: str, tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path)
    script = f"""
import os, sys, {"json" if module == "flashinfer_core" else "torch"}
log = os.environ["FAKE_CUDA_LOG"]
before = os.path.exists(log) and os.path.getsize(log)  # torch's own doing
import {module}
assert "flashinfer_core._host" not in sys.modules
assert (os.path.exists(log) and os.path.getsize(log)) == before
from flashinfer_core import _host
print(_host.device_count())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **driver.variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert driver.calls[-2:] == ["cuInit", "cuDeviceGetCount"]  # so the driver was there to be asked
