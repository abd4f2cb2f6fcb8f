"""What names one kernel: a value whose expression is one template instance.

The build, the image store and the launcher see nothing else of an operator.
"""

from __future__ import annotations

from typing import Protocol


class Variant(Protocol):
    """Describe one template instance; in practice a frozen dataclass."""

    @property
    def package(self) -> str:
        """Name the import package whose `kernels/` and `images/` hold it: `flashinfer_attention`."""

    @property
    def source(self) -> str:
        """Name the file below `kernels/`: `attention/attention.cuh`, or a `.cpp` for CPUs."""

    @property
    def name(self) -> str:
        """Name the image file: unique in the package, safe in a path."""

    @property
    def expression(self) -> str:
        """Spell the template instance in C++."""

    @property
    def threads(self) -> int:
        """Count the GPU threads of a CTA; 1 on CPUs."""

    @property
    def shared_bytes(self) -> int:
        """Count the dynamic shared memory of a CTA in bytes; 0 on CPUs."""
