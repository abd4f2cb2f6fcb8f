"""The planner is one header for host and device: NVRTC compiles it for lengths that live on the GPU."""

from __future__ import annotations

import pytest

from flashinfer_attention.variants import PlanLengths
from flashinfer_core import compiler
from tiny_package import needs_nvrtc


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90a"])
def test_the_planner_compiles_for_gpus(target: str) -> None:
    image = compiler.compile_image(PlanLengths(), target)
    assert image.payload
    assert image.spill_bytes == 0
    assert image.registers is not None
    assert image.registers * PlanLengths.threads <= 65536
