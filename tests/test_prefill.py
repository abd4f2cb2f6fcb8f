"""Prefill through the compatible interface, against fp64."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Tuple

import pytest
import torch

import flashinfer
import reference
from batches import HUGE, Paged, indptr_of, poisoned, where
from flashinfer_core.errors import InvalidArgumentError

LN2 = math.log(2.0)
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def workspace(device: str, size: int = 1 << 20) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def plan(wrapper: flashinfer.BatchPrefillWithPagedKVCacheWrapper, batch: Paged, **options: Any) -> None:
    wrapper.plan(
        batch.q_indptr,
        batch.indptr,
        batch.indices,
        batch.last_page_len,
        batch.heads,
        batch.kv_heads,
        batch.dim,
        batch.page_size,
        q_data_type=batch.dtype,
        **options,
    )


def check_paged(batch: Paged, causal: bool, cache: Any = None, size: int = 1 << 20) -> None:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(batch.device, size), batch.layout)
    plan(wrapper, batch, causal=causal)
    out = poisoned(batch.q.shape, batch.dtype, batch.device)
    lse = poisoned(batch.q.shape[:2], torch.float32, batch.device)
    wrapper.run(batch.q, batch.cache if cache is None else cache, out=out, lse=lse, return_lse=True)
    batch.check(out, lse, causal=causal)


def check_ragged(
    batch: Paged, k: torch.Tensor, v: torch.Tensor, kv_indptr: torch.Tensor, causal: bool, layout: str = "NHD"
) -> None:
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(batch.device), layout)
    shape = (batch.heads, batch.kv_heads, batch.dim)
    wrapper.plan(batch.q_indptr, kv_indptr, *shape, causal=causal, q_data_type=batch.dtype)
    out = poisoned(batch.q.shape, batch.dtype, batch.device)
    _, lse = wrapper.run(batch.q, k, v, out=out, return_lse=True)
    batch.check(out, lse, causal=causal)


def ragged_rows(batch: Paged) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return k, v and kv_indptr of the same keys, with rows of NaN after the last."""
    rows = []
    for cache in (batch.k, batch.v):
        keys = reference.gather(cache.cpu(), batch.indices, batch.indptr.tolist(), batch.kv_lens)
        tail = torch.full((3, batch.kv_heads, batch.dim), math.nan, dtype=batch.dtype)
        rows.append(torch.cat([*keys, tail]).to(batch.device))
    return rows[0], rows[1], indptr_of(batch.kv_lens)


@MASKS
@pytest.mark.parametrize(("device", "dtype", "dim"), where())
def test_dtypes_and_head_dims(device: str, dtype: torch.dtype, dim: int, causal: bool) -> None:
    check_paged(Paged([30, 1, 200], [37, 1, 300], dtype=dtype, dim=dim, device=device), causal)


@MASKS
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_groups(device: str, group: int, causal: bool) -> None:
    check_paged(Paged([90, 5, 1], [90, 150, 33], heads=2 * group, kv_heads=2, device=device), causal)


@pytest.mark.parametrize("form", ["combined", "separate"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_sizes_and_layouts(device: str, page_size: int, layout: str, form: str) -> None:
    batch = Paged([20, 100, 3], [70, 100, 64], page_size=page_size, layout=layout, device=device)
    check_paged(batch, True, batch.cache if form == "combined" else batch.pair)


@MASKS
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        pytest.param([], [], id="batch0"),
        pytest.param([0], [10], id="no-queries"),
        pytest.param([4], [0], id="no-keys"),
        pytest.param([1], [10_000], id="one-token"),
        pytest.param([0, 5, 0], [9, 0, 0], id="batch3-partly-empty"),
        pytest.param([50, 7], [20, 3], id="fewer-keys-than-queries"),
        pytest.param([300, 1, 2, 17], [300, 5000, 60, 17], id="prefill-with-decode"),
        pytest.param([(3 * i) % 8 for i in range(129)], [(5 * i * i) % 90 for i in range(129)], id="batch129"),
    ],
)
def test_batches(device: str, q_lens: Any, kv_lens: Any, causal: bool) -> None:
    batch = Paged(q_lens, kv_lens, device=device)
    check_paged(batch, causal)
    check_ragged(batch, *ragged_rows(batch), causal)


@MASKS
@pytest.mark.parametrize("size", [0, 1, 100_000, 1 << 24], ids=lambda n: f"{n}-bytes")
def test_any_workspace_will_do(device: str, size: int, causal: bool) -> None:
    check_paged(Paged([60, 1], [3000, 5000], device=device), causal, size=size)


@MASKS
@pytest.mark.parametrize(("device", "dtype", "dim"), where(dims=(64, 80)))
def test_ragged_dtypes(device: str, dtype: torch.dtype, dim: int, causal: bool) -> None:
    batch = Paged([30, 1, 200], [37, 1, 300], dtype=dtype, dim=dim, device=device)
    check_ragged(batch, *ragged_rows(batch), causal)


def test_ragged_hnd(device: str) -> None:
    batch = Paged([30, 1], [37, 9], device=device)
    k, v, indptr = ragged_rows(batch)
    check_ragged(batch, k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous(), indptr, True, "HND")


def test_ragged_rows_of_a_packed_projection(device: str) -> None:
    """q, k and v are slices of one tensor, as a fused projection makes them."""
    torch.manual_seed(0)
    packed = torch.randn(50, 4 + 2 + 2, 64).half().to(device)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device))
    indptr = indptr_of([20, 30])
    wrapper.plan(indptr, indptr, 4, 2, 64, causal=True)
    o, lse = wrapper.run_return_lse(q, k, v)
    expected, expected_lse = reference.ragged(
        q.cpu(), indptr.tolist(), [k[:20].cpu(), k[20:].cpu()], [v[:20].cpu(), v[20:].cpu()], causal=True
    )
    reference.assert_close(o.cpu(), expected, torch.float16)
    reference.assert_lse_close(lse.cpu() * LN2, expected_lse)


@pytest.mark.parametrize("wrapper_first", ["plan-full", "plan-causal"])
def test_forward_sets_the_mask_anew(device: str, wrapper_first: str) -> None:
    batch = Paged([30, 4], [50, 9], device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    plan(wrapper, batch, causal=wrapper_first == "plan-causal")
    for causal in (True, False):
        o, lse = wrapper.forward_return_lse(batch.q, batch.cache, causal=causal, sm_scale=0.2)
        batch.check(o, lse, causal=causal, sm_scale=0.2)
        assert torch.equal(o, wrapper.forward(batch.q, batch.cache, causal=causal, sm_scale=0.2))


def test_ragged_forward_sets_the_mask_anew(device: str) -> None:
    batch = Paged([30, 4], [50, 9], device=device)
    k, v, indptr = ragged_rows(batch)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device))
    wrapper.begin_forward(batch.q_indptr, indptr, batch.heads, batch.kv_heads, batch.dim)
    o, lse = wrapper.forward_return_lse(batch.q, k, v, causal=True)
    wrapper.end_forward()
    batch.check(o, lse, causal=True)
    assert torch.equal(o, wrapper.forward(batch.q, k, v, causal=True))


def test_buffers_of_a_graph_take_fewer_tokens(device: str) -> None:
    buffers: List[Any] = [torch.full((n,), HUGE, dtype=torch.int32, device=device) for n in (3, 3, 400, 2)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", True, *buffers)
    for seed, (q_lens, kv_lens) in enumerate([([40, 30], [40, 4000]), ([1, 0], [900, 7]), ([0, 70], [0, 70])]):
        batch = Paged(q_lens, kv_lens, seed=seed, device=device)
        plan(wrapper, batch, causal=True)
        q = poisoned((80, batch.heads, batch.dim), batch.dtype, device)
        q[: len(batch.q)] = batch.q
        o, lse = wrapper.run(q, batch.cache, return_lse=True)
        batch.check(o[: len(batch.q)], lse[: len(batch.q)], causal=True)
    assert buffers[0].tolist() == batch.q_indptr.tolist()


def test_ragged_buffers_of_a_graph(device: str) -> None:
    buffers: List[Any] = [torch.full((3,), HUGE, dtype=torch.int32, device=device) for _ in range(2)]
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device), "NHD", True, *buffers)
    for seed, lens in enumerate([[40, 30], [1, 0], [0, 70]]):
        batch = Paged(lens, lens, seed=seed, device=device)
        k, v, indptr = ragged_rows(batch)
        wrapper.plan(batch.q_indptr, indptr, batch.heads, batch.kv_heads, batch.dim, causal=True)
        o, lse = wrapper.run(batch.q, k, v, return_lse=True)
        batch.check(o, lse, causal=True)
    assert buffers[1].tolist() == indptr.tolist()


@MASKS
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (1, 700), (130, 130), (130, 700), (0, 9), (0, 0), (9, 0), (20, 5)]
)
def test_single(device: str, q_len: int, kv_len: int, layout: str, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, 64).half() for n, heads in [(q_len, 6), (kv_len, 2), (kv_len, 2)])
    given = [t.transpose(0, 1).contiguous() if layout == "HND" else t for t in (k, v)]
    on_device: List[Any] = [t.to(device) for t in (q, *given)]
    options: Dict[str, Any] = {"causal": causal, "kv_layout": layout}
    if causal and kv_len < q_len:  # as in FlashInfer; `flashinfer_attention.single` and the wrappers take it
        with pytest.raises(InvalidArgumentError, match=f"got {kv_len} and {q_len}"):
            flashinfer.single_prefill_with_kv_cache(*on_device, **options)
        return
    o, lse = flashinfer.single_prefill_with_kv_cache_return_lse(*on_device, **options)
    expected, expected_lse = reference.attention(q, k, v, causal=causal)
    reference.assert_close(o.cpu(), expected, torch.float16)
    reference.assert_lse_close(lse.cpu() * LN2, expected_lse)
    options["backend"] = "fa2"
    plain: Any = flashinfer.single_prefill_with_kv_cache(*on_device, **options)
    assert torch.equal(o, plain)


def test_a_request_of_10_000_tokens(device: str) -> None:
    """A sample of rows: a causal row is a request of its own, with the keys up to it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(10_000, heads, 64).half().to(device) for heads in (2, 1, 1))
    o, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True)
    assert o.isfinite().all()
    for row in (0, 1, 63, 64, 95, 96, 127, 128, 4999, 9999):
        keys = slice(0, row + 1)
        expected, expected_lse = reference.attention(q[row : row + 1].cpu(), k[keys].cpu(), v[keys].cpu())
        reference.assert_close(o[row].cpu(), expected[0], torch.float16)
        reference.assert_lse_close(lse[row].cpu() * LN2, expected_lse[0])
