"""Which LoRA kernels exist, and which of them ship for a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from flashinfer_core.targets import target_named

CPU_DTYPES = ("f32", "f16", "bf16")
CUDA_DTYPES = ("f16", "bf16")


@dataclass(frozen=True)
class Lora:
    """One instance of `lora::lora`. `dtype` is the element type in C++; `source` says for which kind of target."""

    dtype: str
    source: str

    package = "flashinfer_lora"
    shared_bytes = 0

    @property
    def name(self) -> str:
        return f"lora-{self.dtype}"

    @property
    def expression(self) -> str:
        return f"flashinfer::lora::lora<flashinfer::{self.dtype}>"

    @property
    def threads(self) -> int:
        return 1 if self.source.endswith(".cpp") else 256


def choose(target: str, *, dtype: str) -> Lora:
    """Return the kernel for elements of type `dtype` on `target`."""
    return Lora(dtype, f"lora/lora.{'cpp' if target_named(target).is_cpu else 'cuh'}")


def shipped(target: str) -> Tuple[Lora, ...]:
    """List the variants that a wheel holds for `target`."""
    dtypes: Tuple[str, ...] = CPU_DTYPES if target_named(target).is_cpu else CUDA_DTYPES
    if target.endswith("_75"):
        dtypes = ("f16",)  # sm_75 has no bf16
    return tuple(choose(target, dtype=dtype) for dtype in dtypes)
