"""How many CTAs of a kernel an SM of each architecture holds at once, by the rules of NVIDIA's occupancy calculator.

Limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; a test compares
the result with the driver's own on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

_PARTITIONS = 4  # of an SM, each with a quarter of its registers
_REGISTER_UNIT = 256  # registers are given to warps in multiples of this


@dataclass(frozen=True)
class Chip:
    """What one SM of an architecture has. Bytes of shared memory: of the SM, of one CTA at most, kept of each CTA."""

    warps: int
    ctas: int
    shared: int
    shared_of_cta: int
    shared_kept: int
    shared_unit: int
    registers: int = 65536


CHIPS = {
    "sm_75": Chip(32, 16, 64 << 10, 64 << 10, 0, 256),
    "sm_80": Chip(64, 32, 164 << 10, 163 << 10, 1024, 128),
    "sm_86": Chip(48, 16, 100 << 10, 99 << 10, 1024, 128),
    "sm_89": Chip(48, 24, 100 << 10, 99 << 10, 1024, 128),
    "sm_90": Chip(64, 32, 228 << 10, 227 << 10, 1024, 128),
    "sm_90a": Chip(64, 32, 228 << 10, 227 << 10, 1024, 128),
}


def ctas_of_sm(chip: Chip, *, threads: int, registers: int, shared_bytes: int) -> int:
    """Count the CTAs that run at once on an SM; 0 where one alone does not fit.

    threads: of a CTA. registers: of a thread. shared_bytes: of a CTA, static and dynamic.
    """
    if shared_bytes > chip.shared_of_cta:
        return 0
    warps = -(-threads // 32)
    limits = [chip.ctas, chip.warps // warps]
    if registers:
        of_warp = _rounded(registers * 32, _REGISTER_UNIT)
        limits.append(chip.registers // _PARTITIONS // of_warp * _PARTITIONS // warps)
    if shared_bytes + chip.shared_kept:
        limits.append(chip.shared // _rounded(shared_bytes + chip.shared_kept, chip.shared_unit))
    return min(limits)


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
