"""The architectures that kernels are compiled for, CPUs included, and which of them a device can run.

Nothing here asks the machine: capabilities and CPU flags come in as arguments, so every rule is tested anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import AbstractSet, Sequence, Tuple

from flashinfer_core.errors import InvalidArgumentError, UnsupportedDeviceError

Capability = Tuple[int, int]


@dataclass(frozen=True)
class Target:
    """One architecture. `kind` is cubin, ptx or cpu; `capability` is (0, 0) on CPUs.

    `march` and `extensions` are what a C++ compiler calls a CPU level and what comes on top of it; empty on GPUs.
    """

    name: str
    kind: str
    capability: Capability = (0, 0)
    march: str = ""
    cpu_flags: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    @property
    def is_exact(self) -> bool:
        """Say whether the code runs on this very capability only (`sm_90a`)."""
        return self.name.endswith("a")


# /proc/cpuinfo spells SSE3 "pni" and LZCNT "abm".
_V2 = ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_AMX = (*_V4, "amx_tile", "amx_bf16", "avx512_bf16")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_75", "cubin", (7, 5)),
        Target("sm_80", "cubin", (8, 0)),
        Target("sm_86", "cubin", (8, 6)),
        Target("sm_89", "cubin", (8, 9)),
        Target("sm_90", "cubin", (9, 0)),
        Target("sm_90a", "cubin", (9, 0)),
        Target("compute_75", "ptx", (7, 5)),
        Target("compute_80", "ptx", (8, 0)),
        Target("compute_90", "ptx", (9, 0)),
        Target("x86_64_v2", "cpu", march="x86-64-v2", cpu_flags=_V2),
        Target("x86_64_v3", "cpu", march="x86-64-v3", cpu_flags=_V3),
        Target("x86_64_v4", "cpu", march="x86-64-v4", cpu_flags=_V4),
        Target(
            "x86_64_amx", "cpu", march="x86-64-v4", cpu_flags=_AMX, extensions=("amx-tile", "amx-bf16", "avx512bf16")
        ),
        Target("aarch64", "cpu", march="armv8-a"),
    )
}

OLDEST_CAPABILITY: Capability = (7, 5)


def target_named(name: str) -> Target:
    """Return the target called `name`; raise InvalidArgumentError that lists the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise InvalidArgumentError(f"unknown target {name!r}", remedy=f"known targets: {', '.join(TARGETS)}") from None


def cuda_candidates(capability: Capability) -> list[str]:
    """List the GPU targets that run on `capability`, best first.

    An exact cubin (`sm_90a`, then `sm_90`), cubins of lower minor versions, PTX of any lower or equal version.
    Raises UnsupportedDeviceError below sm_75.
    """
    capability = (capability[0], capability[1])
    if capability < OLDEST_CAPABILITY:
        raise UnsupportedDeviceError(
            f"a GPU of compute capability {capability[0]}.{capability[1]} is too old: kernels need 7.5 (Turing)",
            remedy="run on the CPU, or on a GPU from T4, RTX 20 on; nothing can be installed that changes this",
        )
    fitting = [
        target
        for target in TARGETS.values()
        if (target.kind == "cubin" and _cubin_runs(target, capability))
        or (target.kind == "ptx" and target.capability <= capability)
    ]
    fitting.sort(key=lambda target: (target.kind == "cubin", target.capability, target.is_exact), reverse=True)
    return [target.name for target in fitting]


def _cubin_runs(target: Target, capability: Capability) -> bool:
    if target.is_exact:
        return target.capability == capability
    return target.capability[0] == capability[0] and target.capability[1] <= capability[1]


def cpu_candidates(machine: str, flags: AbstractSet[str]) -> list[str]:
    """List the CPU targets that a processor with these /proc/cpuinfo `flags` runs, best first.

    `machine` is platform.machine(). Raises UnsupportedDeviceError where none runs.
    """
    if machine in ("aarch64", "arm64"):
        return ["aarch64"]
    if machine in ("x86_64", "AMD64"):
        levels = [t for t in TARGETS.values() if t.march.startswith("x86-64") and flags >= set(t.cpu_flags)]
        if levels:
            return [target.name for target in reversed(levels)]
        missing = sorted(set(_V2) - set(flags))
        raise UnsupportedDeviceError(
            f"this CPU is older than x86-64-v2 (it lacks {', '.join(missing)})",
            remedy="use a CPU from 2009 or newer, or tell the emulator to offer at least x86-64-v2",
        )
    raise UnsupportedDeviceError(f"there are no kernels for a {machine!r} CPU", remedy="use x86-64 or aarch64")


def expand(names: Sequence[str], machine: str) -> list[str]:
    """Replace the groups `cpu` (all levels of `machine`) and `cuda` (all GPU targets) in a list; keep the order."""
    groups = {
        "cuda": [t.name for t in TARGETS.values() if not t.is_cpu],
        "cpu": [t.name for t in TARGETS.values() if t.is_cpu and (t.name == "aarch64") == (machine == "aarch64")],
    }
    expanded = [target for name in names for target in groups.get(name, [name])]
    for name in expanded:
        target_named(name)
    return list(dict.fromkeys(expanded))
