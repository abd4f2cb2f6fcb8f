"""Facts of devices, and what the environment forces."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from flashinfer_core import device
from flashinfer_core.device import Gpu
from flashinfer_core.errors import DriverError, InvalidArgumentError
from flashinfer_core.targets import cpu_candidates, target_named

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.0GHz
flags\t\t: fpu sse avx2

processor\t: 1
model name\t: Another
"""


def test_cpuinfo_of_x86_and_arm() -> None:
    cpu = device.parse_cpuinfo("x86_64", CPUINFO)
    assert (cpu.model, cpu.flags) == ("Some CPU @ 2.0GHz", frozenset({"fpu", "sse", "avx2"}))
    arm = device.parse_cpuinfo("aarch64", "processor\t: 0\nFeatures\t: fp asimd\n")
    assert (arm.model, arm.flags) == ("", frozenset({"fp", "asimd"}))


@pytest.mark.parametrize("permitted", [True, False])
def test_tiles_count_where_linux_permits_them(permitted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = " ".join(target_named("x86_64_amx").cpu_flags)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(device, "permit_tiles", lambda: permitted)
    found = device.read_cpu(cpuinfo)
    assert found.flags == set(flags.split()) - (set() if permitted else {"amx_tile"})
    assert cpu_candidates("x86_64", found.flags)[0] == ("x86_64_amx" if permitted else "x86_64_v4")


@pytest.mark.skipif("amx_tile" not in device.cpu().flags, reason="this CPU, or its Linux, has no tiles")
def test_permission_for_tiles_can_be_asked_again() -> None:
    assert device.permit_tiles()


def test_this_cpu_has_candidates() -> None:
    assert device.candidates("cpu") == cpu_candidates(platform.machine(), device.cpu().flags)


@pytest.mark.parametrize("target", ["x86_64_v2", "aarch64"])
def test_forced_cpu_target(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CPU_TARGET", target)
    if (target == "aarch64") == (platform.machine() == "aarch64"):
        assert device.candidates("cpu") == [target]
    else:
        with pytest.raises(InvalidArgumentError, match=rf"FLASHINFER_CPU_TARGET={target} cannot run on this device\n"):
            device.candidates("cpu")


def test_forced_cuda_target(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = Gpu(0, "H100", (9, 0), 132, 232448, 80 << 30, 50 << 20, "uuid")
    monkeypatch.setattr(device, "gpu", lambda _: h100)
    assert device.candidates(0)[0] == "sm_90a"
    monkeypatch.setenv("FLASHINFER_CUDA_TARGET", "compute_75")
    assert device.candidates(0) == ["compute_75"]
    monkeypatch.setenv("FLASHINFER_CUDA_TARGET", "sm_80")
    with pytest.raises(InvalidArgumentError, match="FLASHINFER_CUDA_TARGET=sm_80 cannot run"):
        device.candidates(0)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_NUM_THREADS", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    assert device.num_threads() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("FLASHINFER_NUM_THREADS", "3")
    assert device.num_threads() == 3
    monkeypatch.setenv("FLASHINFER_NUM_THREADS", "0")
    with pytest.raises(InvalidArgumentError, match="FLASHINFER_NUM_THREADS=0"):
        device.num_threads()


def test_driver_errors_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_core import _host

    def absent() -> int:
        raise RuntimeError("libcuda.so.1 was not found")

    monkeypatch.setattr(_host, "driver_version", absent, raising=False)
    with pytest.raises(DriverError, match=r"libcuda\.so\.1 was not found\npython -m flashinfer_core"):
        device.driver_version()
