"""What all tests share: where they run."""

from __future__ import annotations

import functools
import os

import pytest


@functools.lru_cache(maxsize=None)
def _why_no_gpu() -> str:
    import torch  # here: some tests run where there is no torch

    return "" if torch.cuda.is_available() else "needs a GPU, and torch finds none"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none, and bfloat16 where sm_75 is forced, which has none."""
    if item.get_closest_marker("gpu") is None:
        return
    if _why_no_gpu():
        pytest.skip(_why_no_gpu())
    if "bf16" in item.name and os.environ.get("FLASHINFER_CUDA_TARGET", "").endswith("_75"):
        pytest.skip("sm_75 has no bfloat16 arithmetic")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test on the CPU and, where there is one, on a GPU."""
    return str(request.param)
