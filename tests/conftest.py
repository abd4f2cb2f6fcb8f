"""What all tests share: where they run."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import pytest


@functools.lru_cache(maxsize=None)
def _why_no_gpu() -> str:
    import torch  # here: some tests run where there is no torch

    return "" if torch.cuda.is_available() else "needs a GPU, and torch finds none"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none, and the dtype bfloat16 where sm_75 is forced, which has none."""
    if item.get_closest_marker("gpu") is None:
        return
    if _why_no_gpu():
        pytest.skip(_why_no_gpu())
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if str(parameters.get("dtype")) == "torch.bfloat16" and os.environ.get("FLASHINFER_CUDA_TARGET", "").endswith(
        "_75"
    ):
        pytest.skip("sm_75 has no bfloat16 arithmetic")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test on the CPU and, where there is one, on a GPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _problems_are_checked_anew() -> None:
    """Forget problems found to have kernels: tests change what there are kernels for."""
    checks = sys.modules.get("flashinfer_attention.checks")
    if checks is not None:
        checks._problem.cache_clear()


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test where it launches a kernel."""
    from flashinfer_core.kernel import BoundLaunch, Kernel  # here: some tests run where nothing of ours is installed

    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(Kernel, "launch", launch)
    monkeypatch.setattr(BoundLaunch, "launch", launch)
