"""Recursive attention over pieces of keys gives what attention over all of them gives."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from batches import indptr_of
from flashinfer_attention import ChunkedAttention, chunked_attention, single
from flashinfer_core.errors import InvalidArgumentError
from test_cascade import MASKS

HEADS, KV_HEADS, DIM = 4, 2, 64


def request(
    q_len: int, kv_len: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((q_len, HEADS, DIM), (kv_len, KV_HEADS, DIM), (kv_len, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    return q, k, v


def pieces_of(k: torch.Tensor, v: torch.Tensor, sizes: Sequence[int]) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    ends = indptr_of(sizes).tolist()
    return [(k[begin:end], v[begin:end]) for begin, end in zip(ends, ends[1:])]


def check(got: Any, want: Any, dtype: torch.dtype) -> None:
    reference.assert_close(got[0].cpu(), want[0], dtype)
    reference.assert_lse_close(got[1].cpu(), want[1])


@MASKS
@pytest.mark.parametrize(
    "sizes", [[300], [100, 200], [1, 299], [299, 1], [0, 300, 0], [50] * 6, [290, 3, 3, 4]], ids=str
)
@pytest.mark.parametrize("q_len", [1, 40, 300])
def test_pieces_of_any_size(device: str, sizes: List[int], q_len: int, causal: bool) -> None:
    q, k, v = request(q_len, 300, torch.float16, device)
    got = chunked_attention(q, pieces_of(k, v, sizes), num_kv_heads=KV_HEADS, causal=causal, kv_len=300)
    check(got, reference.attention(q.cpu(), k.cpu(), v.cpu(), causal=causal), torch.float16)
    direct = single(q, k, v, causal=causal)
    torch.testing.assert_close(got[0].float(), direct[0].float(), rtol=2.0**-9, atol=2.0**-9)
    torch.testing.assert_close(got[1], direct[1], rtol=2.0**-17, atol=2.0**-13)


@MASKS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
def test_many_small_pieces_keep_fp32(device: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = request(8, 2000, dtype, device)
    got = chunked_attention(q, pieces_of(k, v, [25] * 80), num_kv_heads=KV_HEADS, causal=causal, kv_len=2000)
    check(got, reference.attention(q.cpu(), k.cpu(), v.cpu(), causal=causal), dtype)


def check_batch(q_lens: Sequence[int], pieces: Sequence[Sequence[int]], causal: bool, device: str) -> None:
    """`pieces`: of each piece the keys of each request."""
    kv_lens = [sum(piece[i] for piece in pieces) for i in range(len(q_lens))]
    dtype = torch.float32 if device == "cpu" else torch.float16
    requests = [request(q_len, kv_len, dtype, device, i) for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens))]
    q = torch.cat([one[0] for one in requests])
    first = [kv_len - q_len for q_len, kv_len in zip(q_lens, kv_lens)] if causal else None
    chunked = ChunkedAttention(q, num_kv_heads=KV_HEADS, q_indptr=indptr_of(q_lens), first_key=first)
    done = [0] * len(q_lens)
    for piece in pieces:
        k, v = (
            torch.cat([one[part][begin : begin + keys] for one, begin, keys in zip(requests, done, piece)])
            for part in (1, 2)
        )
        chunked.add(k, v, kv_indptr=indptr_of(piece))
        done = [begin + keys for begin, keys in zip(done, piece)]
    keys, values = ([one[part].cpu() for one in requests] for part in (1, 2))
    want = reference.ragged(q.cpu(), indptr_of(q_lens).tolist(), keys, values, causal=causal)
    check(chunked.result(), want, dtype)


@MASKS
def test_batches(device: str, causal: bool) -> None:
    check_batch([1, 0, 30, 7], [[50, 3, 10, 0], [0, 9, 20, 0], [70, 0, 15, 2]], causal, device)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), causal=st.booleans())
def test_any_batch(data: Any, causal: bool) -> None:
    requests = data.draw(st.integers(1, 4))
    q_lens = data.draw(st.lists(st.integers(0, 9), min_size=requests, max_size=requests))
    keys = st.lists(st.integers(0, 12), min_size=requests, max_size=requests)
    check_batch(q_lens, data.draw(st.lists(keys, min_size=1, max_size=5)), causal, "cpu")


def test_the_result_so_far(device: str) -> None:
    q, k, v = request(5, 90, torch.float16, device)
    chunked = ChunkedAttention(q, num_kv_heads=KV_HEADS, sm_scale=0.3)
    o, lse = chunked.result()
    assert not o.any()
    assert (lse == -float("inf")).all()
    for begin in range(0, 90, 30):
        chunked.add(k[begin : begin + 30], v[begin : begin + 30])
        seen = slice(0, begin + 30)
        want = reference.attention(q.cpu(), k[seen].cpu(), v[seen].cpu(), sm_scale=0.3)
        check(chunked.result(), want, torch.float16)


def test_small_workspaces(device: str) -> None:
    q, k, v = request(1, 5000, torch.float16, device)
    room = torch.empty(5000, dtype=torch.uint8, device=device)
    got = chunked_attention(q, pieces_of(k, v, [1700, 1700, 1600]), num_kv_heads=KV_HEADS, workspace=room)
    check(got, reference.attention(q.cpu(), k.cpu(), v.cpu()), torch.float16)


@pytest.mark.usefixtures("no_launch")
def test_what_is_refused() -> None:
    q, k, v = request(4, 10, torch.float32, "cpu")
    with pytest.raises(InvalidArgumentError, match="causal=True needs kv_len"):
        chunked_attention(q, [(k, v)], num_kv_heads=KV_HEADS, causal=True)
    with pytest.raises(InvalidArgumentError, match="must end with the 4 rows of q, got 3"):
        ChunkedAttention(q, num_kv_heads=KV_HEADS, q_indptr=indptr_of([3]))
    with pytest.raises(InvalidArgumentError, match="first_key must have 1 elements, got 2"):
        ChunkedAttention(q, num_kv_heads=KV_HEADS, first_key=[0, 1])
    with pytest.raises(InvalidArgumentError, match="kv_indptr must have 2 elements, got 3"):
        ChunkedAttention(q, num_kv_heads=KV_HEADS).add(k, v, kv_indptr=indptr_of([5, 5]))
    with pytest.raises(InvalidArgumentError, match=r"k must have shape \[any, 2, 64\]"):
        ChunkedAttention(q, num_kv_heads=KV_HEADS).add(k[:, :1], v[:, :1])
