"""Facts of the devices at hand, as plain values.

Everything that decides takes these as arguments, so it is tested where there is no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashinfer_core import settings, targets
from flashinfer_core.errors import DriverError


@dataclass(frozen=True)
class Cpu:
    """The processor: platform.machine(), its model's name, its flags as /proc/cpuinfo spells them.

    `amx_tile` is among the flags only where Linux lets this process use tiles.
    """

    machine: str
    model: str
    flags: frozenset[str]


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. Sizes are bytes; `shared_optin_bytes` is what one CTA may use at most."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_optin_bytes: int
    total_memory: int
    l2_bytes: int
    uuid: str


@functools.lru_cache(maxsize=None)
def cpu() -> Cpu:
    """Return the processor of this machine, having asked Linux for the tiles of AMX where it has them."""
    return read_cpu(Path("/proc/cpuinfo"))


def read_cpu(cpuinfo: Path) -> Cpu:
    """Do the work of `cpu` for another file than /proc/cpuinfo."""
    try:
        found = parse_cpuinfo(platform.machine(), cpuinfo.read_text())
    except OSError:
        return Cpu(platform.machine(), platform.processor(), frozenset())
    refused = {"amx_tile"} if "amx_tile" in found.flags and not permit_tiles() else set()
    return replace(found, flags=found.flags - refused)


def permit_tiles() -> bool:
    """Ask Linux to let this process, all its threads and children, use AMX; say whether it does.

    Without this the first tile instruction kills the process: saving tiles makes each signal frame 8 KB larger, so
    Linux wants to be asked. Before 5.16, where a thread's signal stack is too small, and in some sandboxes it refuses.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def parse_cpuinfo(machine: str, text: str) -> Cpu:
    """Read the first processor of a /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features") or ""
    return Cpu(machine, facts.get("model name", ""), frozenset(flags.split()))


@functools.lru_cache(maxsize=None)
def gpu(ordinal: int) -> Gpu:
    """Return the facts of one CUDA device; raise DriverError where there is no driver or no such device."""
    facts = host_call("device_facts", ordinal)
    major, minor = facts["capability"]
    rest = {name: facts[name] for name in ("sm_count", "shared_optin_bytes", "total_memory", "l2_bytes")}
    return Gpu(ordinal, facts["name"], (major, minor), uuid=str(facts["uuid"]), **rest)


def gpus() -> list[Gpu]:
    """Return all CUDA devices; raise DriverError where there is no driver."""
    return [gpu(ordinal) for ordinal in range(host_call("device_count"))]


def driver_version() -> int:
    """Return the newest CUDA that the driver runs, as 1000 * major + 10 * minor; raise DriverError without one."""
    return int(host_call("driver_version"))


def host_call(name: str, *arguments: Any) -> Any:
    """Call a function of the host extension, its RuntimeError turned into DriverError."""
    from flashinfer_core import _host

    try:
        return getattr(_host, name)(*arguments)
    except RuntimeError as error:
        raise DriverError(str(error), remedy="python -m flashinfer_core lists what is wrong with the set-up") from None


def candidates(device: str | int) -> list[str]:
    """List the targets that `device` ("cpu" or a CUDA ordinal) runs, best first.

    FLASHINFER_CPU_TARGET and FLASHINFER_CUDA_TARGET replace the list by one target that must be of it. Raises
    UnsupportedDeviceError for a device without kernels, InvalidArgumentError for a forced target that cannot run.
    """
    if device == "cpu":
        kind, fitting = "cpu", targets.cpu_candidates(cpu().machine, cpu().flags)
    else:
        kind, fitting = "cuda", targets.cuda_candidates(gpu(int(device)).capability)
    forced = settings.forced_target(kind)
    if not forced:
        return fitting
    settings.check_target(kind, forced, fitting)
    return [forced]


def num_threads() -> int:
    """Return the threads for CPU kernels: FLASHINFER_NUM_THREADS, else torch's, else the CPUs this process may use."""
    asked = os.environ.get(settings.NUM_THREADS)
    if asked:
        return settings.parse_threads(asked)
    torch: Any | None = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0))
