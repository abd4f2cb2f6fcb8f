"""Which append kernels exist, which of them ship for a target, and which one a call gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple, Union

PACKAGE = "flashinfer_page"

VECTOR_BYTES = (16, 8, 4, 2)


@dataclass(frozen=True)
class Append:
    """One instance of `page::append` on a GPU; it copies `vector_bytes` at a time, whatever the elements are."""

    vector_bytes: int

    package = PACKAGE
    source = "page/append.cuh"
    threads = 128
    shared_bytes = 0

    @property
    def name(self) -> str:
        return f"append-{self.vector_bytes}"

    @property
    def expression(self) -> str:
        return f"flashinfer::page::append<{self.vector_bytes}>"


@dataclass(frozen=True)
class AppendCpu:
    """`page::append` on a CPU, which copies rows of any size."""

    package = PACKAGE
    source = "page/append.cpp"
    name = "append"
    expression = "flashinfer::page::append"
    threads = 1
    shared_bytes = 0


AnyAppend = Union[Append, AppendCpu]


def choose(*, cpu: bool, alignment: int) -> AnyAppend:
    """Choose the kernel with the widest vector that divides `alignment`: of all addresses, strides and rows, in bytes.

    Pure; nothing is loaded. An odd alignment has no kernel on GPUs, and gets the narrowest.
    """
    if cpu:
        return AppendCpu()
    return Append(next((width for width in VECTOR_BYTES if alignment % width == 0), VECTOR_BYTES[-1]))


def shipped(target: str) -> Tuple[AnyAppend, ...]:
    """List the variants that a wheel holds for `target`."""
    if target.startswith(("sm_", "compute_")):
        return tuple(Append(width) for width in VECTOR_BYTES)
    return (AppendCpu(),)
