"""Lengths and positions from page tables, as plain torch operations: nothing waits for the device."""

from __future__ import annotations

from typing import Tuple

import torch

from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_int32, check_integer, check_tensor

_INT32_MAX = 2**31 - 1


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the tokens that each request has in the cache: int32 [B], on the device of kv_indptr.

    kv_indptr: int32 [B + 1], into the page indices. kv_last_page_len: int32 [B], tokens of the last page; 0 for a
    request without pages. page_size: tokens of a page. A length beyond int32 raises InvalidArgumentError on a CPU; on
    a GPU, where looking would wait, it is 2^31 - 1. Raises InvalidArgumentError, InvalidTypeError.
    """
    _check_lengths("kv_indptr", kv_indptr, "kv_last_page_len", kv_last_page_len)
    if not 1 <= check_integer("page_size", page_size) <= _INT32_MAX:
        raise InvalidArgumentError(f"page_size must be at least 1 and fit int32, got {page_size}")
    full_pages = (kv_indptr[1:] - kv_indptr[:-1] - 1).clamp(min=0)
    lengths = full_pages.long() * page_size + kv_last_page_len
    if lengths.device.type == "cpu" and bool((lengths > _INT32_MAX).any()):
        request = int(lengths.argmax())
        raise InvalidArgumentError(f"request {request} has {int(lengths[request])} tokens, more than int32 holds")
    return lengths.clamp(max=_INT32_MAX).int()


def get_batch_indices_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return, for each of nnz new tokens, its request and its position there: two int32 [nnz].

    append_indptr: int32 [B + 1], new tokens of each request. seq_lens: int32 [B], tokens of each request with the new
    ones. Tokens from append_indptr[-1] on, which pad a CUDA graph, get request 0 and position -1: append skips them.
    Raises InvalidArgumentError, InvalidTypeError.
    """
    _check_lengths("append_indptr", append_indptr, "seq_lens", seq_lens)
    requests = append_indptr.shape[0] - 1
    if check_integer("nnz", nnz) < 0:
        raise InvalidArgumentError(f"nnz must not be negative, got {nnz}")
    token = torch.arange(nnz, dtype=torch.int32, device=append_indptr.device)
    if requests == 0:
        return torch.zeros_like(token), torch.full_like(token, -1)
    ends = append_indptr[1:]
    request = torch.searchsorted(ends, token, right=True, out_int32=True)
    real = request < requests
    request = torch.where(real, request, 0)
    position = seq_lens[request] - ends[request] + token
    return request, torch.where(real, position, -1)


def _check_lengths(name: str, indptr: torch.Tensor, lengths_name: str, lengths: torch.Tensor) -> None:
    """Raise unless `indptr` is int32 [B + 1], and `lengths` int32 [B] on its device."""
    check_int32(name, indptr)
    if indptr.shape[0] == 0:
        raise InvalidArgumentError(f"{name} must have one element more than there are requests, got none")
    check_tensor(lengths_name, lengths, (indptr.shape[0] - 1,), torch.int32, indptr.device)
