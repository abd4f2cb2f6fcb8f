"""Decode through the compatible interface, against fp64."""

from __future__ import annotations

import math
from typing import Any, List

import pytest
import torch

import flashinfer
import reference
from batches import HUGE, Paged, poisoned, where

LN2 = math.log(2.0)


def workspace(device: str, size: int = 1 << 20) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def wrapper_for(batch: Paged, **options: Any) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(batch.device), batch.layout)
    plan(wrapper, batch, **options)
    return wrapper


def plan(wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, batch: Paged, **options: Any) -> None:
    wrapper.plan(
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


def check(wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, batch: Paged, cache: Any, **options: Any) -> None:
    out = poisoned(batch.q.shape, batch.dtype, batch.device)
    lse = poisoned(batch.q.shape[:2], torch.float32, batch.device)
    got = wrapper.run(batch.q, cache, out=out, lse=lse, return_lse=True)
    assert got[0] is out
    assert got[1] is lse
    batch.check(out, lse, **options)


def decode_batch(kv_lens: Any, **options: Any) -> Paged:
    return Paged([1] * len(kv_lens), list(kv_lens), **options)


@pytest.mark.parametrize(("device", "dtype", "dim"), where())
def test_dtypes_and_head_dims(device: str, dtype: torch.dtype, dim: int) -> None:
    batch = decode_batch([37, 1, 300], dtype=dtype, dim=dim, device=device)
    check(wrapper_for(batch), batch, batch.cache)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_groups(device: str, group: int) -> None:
    batch = decode_batch([90, 5], heads=3 * group, kv_heads=3, device=device)
    check(wrapper_for(batch), batch, batch.cache)


@pytest.mark.parametrize("heads", [71, 128])
def test_more_heads_than_a_tile_has_rows(device: str, heads: int) -> None:
    batch = decode_batch([200, 0, 33], heads=heads, kv_heads=1 if heads == 71 else 8, device=device)
    check(wrapper_for(batch), batch, batch.cache)


@pytest.mark.parametrize("form", ["combined", "separate"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_sizes_and_layouts(device: str, page_size: int, layout: str, form: str) -> None:
    batch = decode_batch([70, 1, 64], page_size=page_size, layout=layout, device=device)
    check(wrapper_for(batch), batch, batch.cache if form == "combined" else batch.pair)


@pytest.mark.parametrize("form", ["combined", "separate"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages_of_one_token_without_their_dimension(device: str, layout: str, form: str) -> None:
    batch = decode_batch([21, 4], page_size=1, layout=layout, device=device)
    cache = batch.cache.squeeze(2 if layout == "NHD" else 3)
    check(wrapper_for(batch), batch, cache if form == "combined" else (cache[:, 0], cache[:, 1]))


@pytest.mark.parametrize(
    "kv_lens",
    [
        pytest.param([], id="batch0"),
        pytest.param([0], id="batch1-empty"),
        pytest.param([10_000], id="batch1-long"),
        pytest.param([0, 1, 10_000], id="batch3"),
        pytest.param([(7 * i * i) % 130 for i in range(129)], id="batch129"),
    ],
)
def test_batches(device: str, kv_lens: Any) -> None:
    batch = decode_batch(kv_lens, dim=64, device=device)
    check(wrapper_for(batch), batch, batch.cache)


def test_an_empty_request_gives_zero_and_minus_infinity(device: str) -> None:
    batch = decode_batch([5, 0], device=device)
    o, lse = wrapper_for(batch).run_return_lse(batch.q, batch.cache)
    assert o[1].eq(0).all()
    assert lse[1].eq(-math.inf).all()


@pytest.mark.parametrize("size", [0, 1, 3000, 40_000, 1 << 24], ids=lambda n: f"{n}-bytes")
def test_any_workspace_will_do(device: str, size: int) -> None:
    batch = decode_batch([5000, 3, 700], device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device, size + 1)[1:])
    plan(wrapper, batch)
    check(wrapper, batch, batch.cache)


def test_strided_inputs(device: str) -> None:
    batch = decode_batch([40, 9], device=device)
    wide = batch.q.new_full((2, 2 * batch.heads, batch.dim + 8), math.nan)
    q = wide[:, ::2, :-8]
    q.copy_(batch.q)
    pages, _, size, heads, dim = batch.cache.shape
    cache = batch.cache.new_full((pages, 2, size + 2, heads, dim + 16), math.nan)[:, :, :size, :, :dim]
    cache.copy_(batch.cache)
    out = batch.q.new_full((batch.heads, 2, batch.dim), math.nan).transpose(0, 1)
    _, lse = wrapper_for(batch).run(q, cache, out=out, return_lse=True)
    batch.check(out, lse)


def test_rows_that_are_not_aligned(device: str) -> None:
    batch = decode_batch([40, 9], device=device)
    q = torch.empty(batch.q.numel() + 1, dtype=batch.dtype, device=device)[1:].view(batch.q.shape).copy_(batch.q)
    cache = torch.empty(batch.cache.numel() + 1, dtype=batch.dtype, device=device)[1:].view(batch.cache.shape)
    check(wrapper_for(batch), batch, cache.copy_(batch.cache))
    batch.q = q
    check(wrapper_for(batch), batch, cache)


@pytest.mark.parametrize("name", ["run", "forward"])
def test_sm_scale(device: str, name: str) -> None:
    batch = decode_batch([50], device=device)
    if name == "run":
        o, lse = wrapper_for(batch, sm_scale=0.7).run(batch.q, batch.cache, return_lse=True)
    else:
        o, lse = wrapper_for(batch).forward_return_lse(batch.q, batch.cache, sm_scale=0.7)
    batch.check(o, lse, sm_scale=0.7)


def test_old_names(device: str) -> None:
    batch = decode_batch([50, 2], device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    wrapper.begin_forward(
        batch.indptr, batch.indices, batch.last_page_len, batch.heads, batch.kv_heads, batch.dim, batch.page_size
    )
    o = wrapper.forward(batch.q, batch.cache)
    wrapper.end_forward()
    plain: Any = wrapper.run(batch.q, batch.cache)
    assert torch.equal(o, plain)


@pytest.mark.parametrize(
    "types",
    [
        {"data_type": "bfloat16"},
        {"data_type": torch.bfloat16},
        {"q_data_type": "bfloat16"},
        {"q_data_type": torch.bfloat16, "kv_data_type": "bfloat16"},
        {"q_data_type": None, "data_type": "bfloat16"},
    ],
    ids=lambda types: "-".join(types),
)
def test_ways_to_name_the_dtype(types: Any) -> None:
    batch = decode_batch([50, 2], dtype=torch.bfloat16)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    tables = (batch.indptr, batch.indices, batch.last_page_len)
    wrapper.plan(*tables, batch.heads, batch.kv_heads, batch.dim, batch.page_size, **types)
    check(wrapper, batch, batch.cache)


def test_lengths_on_the_device(device: str) -> None:
    batch = decode_batch([50, 2], device=device)
    batch.indptr, batch.last_page_len = batch.indptr.to(device), batch.last_page_len.to(device)
    wrapper = wrapper_for(batch)
    batch.indptr, batch.last_page_len = batch.indptr.cpu(), batch.last_page_len.cpu()
    check(wrapper, batch, batch.cache)


def test_replanning_and_resetting_the_workspace(device: str) -> None:
    first, second = decode_batch([50, 2], device=device), decode_batch([1, 3000, 7], device=device, seed=1)
    wrapper = wrapper_for(first)
    check(wrapper, first, first.cache)
    plan(wrapper, second)
    check(wrapper, second, second.cache)
    wrapper.reset_workspace_buffer(workspace(device, 100), workspace(device, 1 << 20))
    plan(wrapper, first)
    check(wrapper, first, first.cache)


def test_buffers_of_a_graph_take_batches_of_one_size(device: str) -> None:
    buffers: List[Any] = [torch.full((n,), HUGE, dtype=torch.int32, device=device) for n in (4, 300, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(device), *buffers)
    for seed, kv_lens in enumerate([[1, 2, 3], [4000, 0, 1], [0, 0, 0], [17, 900, 33]]):
        batch = decode_batch(kv_lens, seed=seed, device=device)
        plan(wrapper, batch)
        check(wrapper, batch, batch.cache)
    assert wrapper.is_cuda_graph_enabled
    assert buffers[0].tolist() == batch.indptr.tolist()
    assert buffers[2].tolist() == batch.last_page_len.tolist()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_len", [0, 1, 500, 10_000])
def test_single(device: str, kv_len: int, layout: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, 64).half().to(device) for shape in [(8,), (kv_len, 2), (kv_len, 2)])
    given_k, given_v = (t.transpose(0, 1).contiguous() if layout == "HND" else t for t in (k, v))
    o = flashinfer.single_decode_with_kv_cache(q, given_k, given_v, kv_layout=layout, sm_scale=0.3)
    expected, _ = reference.attention(q[None].cpu(), k.cpu(), v.cpu(), sm_scale=0.3)
    reference.assert_close(o.cpu(), expected[0], torch.float16)


def test_page_offsets_beyond_31_bits(device: str) -> None:
    """Pages lie up to 4.3e9 elements (8.6 GB) apart; a CPU commits only those that are written."""
    pages, heads, dim = 33_000, 2, 256
    cache = torch.empty(pages, 2, 128, heads, dim, dtype=torch.float16, device=device)
    assert cache.stride(0) * (pages - 1) > 2**32
    batch = decode_batch([128 * 3], heads=4, kv_heads=heads, dim=dim, page_size=128, device=device)
    for old, new in zip(range(3), [pages - 1, 0, pages // 2]):
        cache[new] = batch.cache[batch.indices[old]]
    batch.indices[:3] = torch.tensor([pages - 1, 0, pages // 2])
    o, lse = wrapper_for(batch).run(batch.q, cache, return_lse=True)
    k, v = (torch.cat([cache[int(i), side] for i in batch.indices[:3]])[None] for side in (0, 1))
    expected, expected_lse = reference.ragged(batch.q.cpu(), [0, 1], list(k.cpu()), list(v.cpu()))
    reference.assert_close(o.cpu(), expected, torch.float16)
    reference.assert_lse_close(lse.cpu() * LN2, expected_lse)


def test_torch_default_device_changes_nothing() -> None:
    batch = Paged([1, 1], [40, 7], heads=8, dim=64)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    plain = planned(wrapper, batch)
    with torch.device("meta"):
        assert torch.equal(planned(wrapper, batch), plain)


def planned(wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, batch: Paged) -> torch.Tensor:
    wrapper.plan(batch.indptr, batch.indices, batch.last_page_len, 8, 2, 64, 16, q_data_type=batch.dtype)
    out = wrapper.run(batch.q, batch.cache)
    assert isinstance(out, torch.Tensor)
    return out
