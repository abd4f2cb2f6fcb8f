"""Which LoRA kernels exist, and which of them ship for a target."""

from __future__ import annotations

from typing import Tuple

from flashinfer_core.variant import Variant


def shipped(target: str) -> Tuple[Variant, ...]:  # noqa: ARG001  every package answers the same question
    """List the images of one target's wheel: none yet."""
    return ()
