"""The paged cache: what append writes, and what it leaves alone."""

from __future__ import annotations

from typing import Any, List

import pytest
import torch

import flashinfer
from batches import DTYPES, HUGE, indptr_of

LENGTHS = [([3, 0, 20], [3, 5, 40]), ([1] * 4, [1, 16, 17, 64]), ([], []), ([0], [0]), ([500], [700])]


class Appended:
    """Requests that grow by `new` tokens to `total`, and the cache before and after."""

    def __init__(self, new: List[int], total: List[int], page_size: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.new, self.total, self.page_size = new, total, page_size
        pages = [-(-n // page_size) for n in total]
        self.indptr = indptr_of(pages).to(device)
        order = torch.randperm(sum(pages) + 2)
        self.indices = torch.cat([order[: sum(pages)], torch.tensor([HUGE])]).int().to(device)
        last = [n - (p - 1) * page_size if p else 0 for n, p in zip(total, pages)]
        self.last_page_len = torch.tensor(last, dtype=torch.int32, device=device)
        tokens = sum(new)
        self.k, self.v = (torch.randn(tokens, 2, 24).to(dtype).to(device) for _ in range(2))
        self.before = torch.randn(sum(pages) + 2, 2, page_size, 2, 24).to(dtype).to(device)
        seq_lens = flashinfer.get_seq_lens(self.indptr, self.last_page_len, page_size)
        append_indptr = indptr_of(new).to(device)
        self.places = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, tokens)

    def expected(self) -> torch.Tensor:
        """Return the cache after the append, token by token."""
        cache, token = self.before.clone(), 0
        for request, (new, total) in enumerate(zip(self.new, self.total)):
            for position in range(total - new, total):
                page = int(self.indices[int(self.indptr[request]) + position // self.page_size])
                cache[page, 0, position % self.page_size] = self.k[token]
                cache[page, 1, position % self.page_size] = self.v[token]
                token += 1
        return cache

    def append(self, cache: Any, layout: str = "NHD") -> None:
        tables = (self.indices, self.indptr, self.last_page_len)
        flashinfer.append_paged_kv_cache(self.k, self.v, *self.places, cache, *tables, kv_layout=layout)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("form", ["combined", "separate"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize(("new", "total"), LENGTHS, ids=lambda lengths: "+".join(map(str, lengths)) or "none")
def test_append(device: str, new: List[int], total: List[int], page_size: int, layout: str, form: str) -> None:
    case = Appended(new, total, page_size, torch.float16, device)
    expected = case.expected()
    cache = case.before.transpose(2, 3).contiguous() if layout == "HND" else case.before
    case.append(cache if form == "combined" else (cache[:, 0], cache[:, 1]), layout)
    assert same_bits(cache.transpose(2, 3) if layout == "HND" else cache, expected)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float8_e4m3fn], ids=[*DTYPES, "e4m3"])
def test_append_copies_any_dtype(device: str, dtype: torch.dtype) -> None:
    case = Appended([3, 20], [3, 40], 16, dtype, device)
    expected = case.expected()
    case.append(case.before)
    assert same_bits(case.before, expected)


@pytest.mark.parametrize("offset", [0, 1, 2, 4], ids=lambda offset: f"offset{offset}")
def test_append_strided_and_unaligned_rows(device: str, offset: int) -> None:
    case = Appended([3, 20], [3, 40], 16, torch.float16, device)
    expected = case.expected()
    packed = torch.randn(23, 5, 24 + offset, device=device).half()
    packed[:, 1:3, :24], packed[:, 3:5, :24] = case.k, case.v
    case.k, case.v = packed[:, 1:3, :24], packed[:, 3:5, :24]
    case.append(case.before)
    assert same_bits(case.before, expected)


def test_append_to_pages_of_one_token_without_their_dimension(device: str) -> None:
    case = Appended([3, 20], [3, 40], 1, torch.float16, device)
    expected = case.expected()
    case.append(case.before.squeeze(2))
    assert same_bits(case.before, expected)


def test_a_token_past_the_pages_of_its_request_is_skipped(device: str) -> None:
    case = Appended([1, 1], [1, 1], 16, torch.float16, device)
    expected = case.before.clone()
    expected[int(case.indices[1]), :, 0] = torch.stack([case.k[1], case.v[1]])
    case.places = (case.places[0], torch.tensor([16, 0], dtype=torch.int32, device=device))
    case.append(case.before)
    assert same_bits(case.before, expected)


def test_negative_positions_are_skipped(device: str) -> None:
    case = Appended([3, 20], [3, 40], 16, torch.float16, device)
    before = case.before.clone()
    case.places = (case.places[0], torch.full_like(case.places[1], -1))
    case.append(case.before)
    assert same_bits(case.before, before)


def test_append_beyond_31_bits(device: str) -> None:
    """The last page lies 4.3e9 elements into the cache; a CPU commits only what is written."""
    pages = 33_000
    cache = torch.empty(pages, 2, 128, 2, 256, dtype=torch.float16, device=device)
    k = torch.randn(1, 2, 256, device=device).half()
    one = torch.ones(1, dtype=torch.int32, device=device)
    places = (torch.zeros_like(one), 127 * one)
    flashinfer.append_paged_kv_cache(
        k, -k, *places, cache, (pages - 1) * one, torch.tensor([0, 1], dtype=torch.int32, device=device), 128 * one
    )
    assert torch.equal(cache[-1, 0, -1], k[0])
    assert torch.equal(cache[-1, 1, -1], -k[0])


def test_lengths_and_positions(device: str) -> None:
    def vector(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    seq_lens = flashinfer.get_seq_lens(vector(0, 2, 2, 5), vector(7, 0, 16), 16)
    assert seq_lens.dtype == torch.int32
    assert seq_lens.tolist() == [23, 0, 48]
    batch, positions = flashinfer.get_batch_indices_positions(vector(0, 3, 3, 5), seq_lens, 5)
    assert (batch.dtype, positions.dtype) == (torch.int32, torch.int32)
    assert batch.tolist() == [0, 0, 0, 2, 2]
    assert positions.tolist() == [20, 21, 22, 46, 47]


def test_tokens_past_the_last_pad_a_graph(device: str) -> None:
    indptr = torch.tensor([0, 2], dtype=torch.int32, device=device)
    batch, positions = flashinfer.get_batch_indices_positions(indptr, indptr[1:] + 5, 4)
    assert batch.tolist() == [0, 0, 0, 0]
    assert positions.tolist() == [5, 6, -1, -1]
