"""The lengths of a batch in host memory, from whatever form the caller has them in.

Everything here is a copy of our own, so that callers may reuse their tensors at once. Host tensors cost no
synchronisation; tensors on a GPU are copied back, which waits.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer_attention.checks import refuse_capture
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_int32, check_integer, check_readable

_INT32_MAX = 2**31 - 1


class Queries(NamedTuple):
    """Queries of a batch: int32 [B + 1] on the host, their number, and those of the longest request."""

    indptr: torch.Tensor
    tokens: int
    longest: int


class Lengths(NamedTuple):
    """All lengths of a batch. kv_indptr: int32 [B + 1]; kv_len: int32 [B]; entries: KV rows or table entries."""

    queries: Queries
    kv_indptr: torch.Tensor
    kv_len: torch.Tensor
    entries: int

    @property
    def num_requests(self) -> int:
        return self.kv_len.shape[0]


def one_query_each(requests: int) -> Queries:
    """Return the queries of a decode batch."""
    return Queries(torch.arange(requests + 1, dtype=torch.int32, device="cpu"), requests, 1)


def host_queries(q_indptr: torch.Tensor) -> Queries:
    """Check and copy q_indptr, int32 [B + 1]. Whether it decreases is for the planner to see."""
    check_int32("q_indptr", q_indptr)
    if q_indptr.shape[0] == 0:
        raise InvalidArgumentError("q_indptr must have one element more than there are requests, got none")
    own = _own("q_indptr", q_indptr)
    longest = int((own[1:] - own[:-1]).max()) if own.shape[0] > 1 else 0
    return Queries(own, int(own[-1]), longest)


def host_lengths(
    q_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_len: Optional[torch.Tensor], page_size: Optional[int]
) -> Lengths:
    """Check and copy the lengths of the native operator; see `plan_attention`."""
    queries = host_queries(q_indptr)
    requests = queries.indptr.shape[0] - 1
    check_int32("kv_indptr", kv_indptr, requests + 1)
    if page_size is not None:
        check_page_size(page_size)
    if page_size is not None and kv_len is None:
        raise InvalidArgumentError("kv_len is needed with pages: the last page of a request may be part full")
    own = _own("kv_indptr", kv_indptr)
    rows = own[1:] - own[:-1]
    if kv_len is None:
        return Lengths(queries, own, rows, int(own[-1]))
    check_int32("kv_len", kv_len, requests)
    lengths = Lengths(queries, own, _own("kv_len", kv_len), int(own[-1]))
    _check_room(lengths.kv_len, rows, page_size or 1)
    return lengths


def paged_lengths(queries: Queries, indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> Lengths:
    """Check and copy the lengths of a page table in FlashInfer's form: int32 [B + 1] and [B].

    Raises where a last page is empty or overfull; a request may have no page, and then that is not read.
    """
    requests = queries.indptr.shape[0] - 1
    check_int32("paged_kv_indptr", indptr, requests + 1)
    check_int32("last_page_len", last_page_len, requests)
    check_page_size(page_size)
    own, last = _own("paged_kv_indptr", indptr), _on_host("last_page_len", last_page_len)
    entries = int(own[-1])
    pages = own[1:] - own[:-1]
    if requests == 0:
        return Lengths(queries, own, pages, entries)
    keys = _keys(last, pages, page_size, entries)
    low, high = torch.aminmax(last)
    if int(pages.min()) > 0 and int(low) >= 1 and int(high) <= page_size:
        return Lengths(queries, own, keys, entries)
    wrong = (((last < 1) | (last > page_size)) & (pages > 0)).nonzero()
    if wrong.numel():
        request = int(wrong[0])
        raise InvalidArgumentError(
            f"last_page_len[{request}] must be from 1 to page_size={page_size}, got {int(last[request])}"
        )
    # Where indptr decreases the planner says so.
    return Lengths(queries, own, torch.where(pages > 0, keys, 0), entries)


def check_page_size(page_size: int) -> None:
    """Raise unless a page has at least one token, and no more than kernels can count."""
    if not 1 <= check_integer("page_size", page_size) <= _INT32_MAX:
        raise InvalidArgumentError(f"page_size must be at least 1 and fit int32, got {page_size}")


def _own(name: str, lengths: torch.Tensor) -> torch.Tensor:
    return lengths.clone() if lengths.device.type == "cpu" else _on_host(name, lengths)


def _on_host(name: str, lengths: torch.Tensor) -> torch.Tensor:
    if lengths.device.type == "cpu":
        return lengths
    check_readable(name, lengths)
    refuse_capture(lengths.device)
    return lengths.cpu()


def _keys(last: torch.Tensor, pages: torch.Tensor, page_size: int, entries: int) -> torch.Tensor:
    """Count the keys of each request; raise where a request has more than int32 holds."""
    if entries * page_size <= _INT32_MAX:
        return torch.add(last, pages, alpha=page_size).sub_(page_size)
    keys = (pages.long() - 1) * page_size + last
    if int(keys.max()) > _INT32_MAX:
        request = int(keys.argmax())
        raise InvalidArgumentError(f"request {request} has {int(keys[request])} keys, more than int32 holds")
    return keys.int()


def _check_room(kv_len: torch.Tensor, rows: torch.Tensor, page_size: int) -> None:
    """Raise where a request has more keys than rows or pages; where kv_indptr decreases the planner says so."""
    room = rows.long() * page_size
    short = ((kv_len > room) & (room >= 0)).nonzero()
    if short.numel():
        request = int(short[0])
        raise InvalidArgumentError(
            f"request {request} has {int(kv_len[request])} keys, but kv_indptr gives it room for {int(room[request])}"
        )
