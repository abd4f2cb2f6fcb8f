"""Every CPU level, not only the one that this machine prefers: attention, merge, append and LoRA."""

from __future__ import annotations

import functools
from typing import Any, Optional

import pytest
import torch

import flashinfer
from batches import DTYPES, Paged, indptr_of
from calls import Call, add_option, check, lacks
from flashinfer_attention import attention, plan_attention
from flashinfer_attention.support import FP8_ELEMENTS
from flashinfer_core import device as devices
from flashinfer_core import images
from flashinfer_core.compiler import compile_image
from flashinfer_core.kernel import load
from flashinfer_core.targets import expand
from flashinfer_lora import add_lora
from flashinfer_page.variants import AppendCpu

LACKING = pytest.mark.skip(reason="this CPU, or its Linux, lacks what the level needs")
TARGETS = [
    pytest.param(name, marks=() if name in devices.candidates("cpu") else LACKING)
    for name in expand(["cpu"], devices.cpu().machine)
]


@functools.lru_cache(maxsize=None)
def compiled(variant: Any, name: str) -> images.Image:
    return compile_image(variant, name)


@pytest.fixture(params=TARGETS, autouse=True)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one target; compile what nobody built for it here, once per process."""
    shipped = images.shipped
    monkeypatch.setattr(
        images, "shipped", lambda variant, name, why: shipped(variant, name, why) or compiled(variant, name)
    )
    monkeypatch.setenv("FLASHINFER_CPU_TARGET", request.param)
    return str(request.param)


def test_the_target_is_the_one_that_runs(target: str) -> None:
    assert load(AppendCpu(), "cpu").target == target


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("q_lens", [[1, 1, 1], [150, 1, 9], [40, 0, 3]], ids=["decode", "prefill", "one-tile"])
@pytest.mark.parametrize("dim", [24, 128, 256], ids=lambda dim: f"d{dim}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: str, dim: int, q_lens: list[int], causal: bool, target: str) -> None:
    batch = Paged(q_lens, [3000, 1, 40], heads=8, dim=dim, dtype=DTYPES[dtype])
    plan = plan_attention(
        q_indptr=batch.q_indptr,
        kv_indptr=batch.indptr,
        kv_len=batch.kv_len,
        num_qo_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        head_dim=dim,
        page_size=batch.page_size,
        causal=causal,
        dtype=batch.dtype,
        device="cpu",
    )
    assert plan.kernels.attention.target == plan.kernels.merge.target == target
    assert plan.merge_workers
    batch.check(*attention(batch.q, batch.k, batch.v, plan=plan, page_table=batch.indices), base2=False, causal=causal)


@pytest.mark.parametrize("window", [11, 300])
@pytest.mark.parametrize("kind", ["decode", "paged"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("f32", None), ("bf16", None), ("f16", "e4m3"), ("bf16", "e5m2")])
def test_every_option_at_once(dtype: str, kv_dtype: Optional[str], kind: str, window: int) -> None:
    fp8 = {element: torch_dtype for torch_dtype, element in FP8_ELEMENTS.items()}
    if kv_dtype is not None and kv_dtype not in fp8:
        pytest.skip("this torch has no fp8")
    lengths = ([1, 1, 1] if kind == "decode" else [150, 0, 9], [700, 20, 2])
    batch = Paged(*lengths, dim=96, dim_vo=72, dtype=DTYPES[dtype], kv_dtype=fp8[kv_dtype] if kv_dtype else None)
    call = Call(["window_left"], {"window_left": window}, {}, {"window_left": window})
    for name in ("mask", "soft-cap", "alibi", "rope", "sinks", "q-tensor", "k-heads", "v-heads"):
        add_option(call, name, batch)
    assert not lacks(batch, call)
    check(kind, batch, call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append(dtype: str) -> None:
    torch.manual_seed(0)
    key, value = (torch.randn(20, 2, 24).to(DTYPES[dtype]) for _ in range(2))
    cache = torch.zeros(3, 2, 8, 2, 24, dtype=DTYPES[dtype])
    indices = torch.tensor([2, 0, 1], dtype=torch.int32)
    tables = (indices, indptr_of([3]), torch.tensor([4], dtype=torch.int32))
    places = flashinfer.get_batch_indices_positions(indptr_of([20]), torch.tensor([20], dtype=torch.int32), 20)
    flashinfer.append_paged_kv_cache(key, value, *places, cache, *tables)
    for written, expected in zip(cache[indices.long()].unbind(1), (key, value)):
        assert torch.equal(written.flatten(0, 1)[:20], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora(dtype: str) -> None:
    torch.manual_seed(0)
    x, y, a, b = (torch.randn(s).to(DTYPES[dtype]) for s in [(5, 264), (5, 70), (2, 9, 264), (2, 70, 9)])
    indices = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
    expected = y.double()
    for token, adapter in enumerate(indices.tolist()):
        if adapter >= 0:
            expected[token] += b[adapter].double() @ (a[adapter].double() @ x[token].double())
    add_lora(y, x, a=a, b=b, indices=indices)
    # One rounding to half a unit in the last place, and of the terms of order 100 that fp32 adds up.
    rounding = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=100 * 2.0**-20)
