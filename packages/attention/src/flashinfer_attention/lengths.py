"""The lengths of a batch, from whatever form the caller has them in.

One call of the host extension checks and copies those on the host, so callers may reuse their tensors at once. Those on
a GPU stay there and are planned there, if the maxima that buffers and tiles follow from are known; else they are copied
back, which waits.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional

import torch

from flashinfer_attention.checks import refuse_capture
from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_int32, check_integer, check_readable

_INT32_MAX = 2**31 - 1


class Queries(NamedTuple):
    """How many queries each request has: int32 [B + 1], checked; None: one each."""

    indptr: Optional[torch.Tensor]
    requests: int


class Source(NamedTuple):
    """Lengths that lie on a GPU. keys: of each request, or with last_pages of its last page; None: all rows."""

    q_indptr: Optional[torch.Tensor]
    kv_indptr: torch.Tensor
    keys: Optional[torch.Tensor]
    page_size: int
    last_pages: bool


class Lengths(NamedTuple):
    """All lengths of a batch, our own copy.

    own: int32 [3 B + 2], q_indptr, kv_indptr and kv_len one after another. facts: what they add up to. most_queries:
    what no request of any batch has more of, as the caller says; None: he does not. source: lengths on a GPU, which the
    host does not read; then `own` is empty until they are planned, and facts are maxima, entries unknown (0).
    """

    own: torch.Tensor
    num_requests: int
    facts: planner.Facts
    most_queries: Optional[int]
    max_pages: Optional[int] = None  # entries of a row, where the page table has a row for each request
    source: Optional[Source] = None

    @property
    def tokens(self) -> int:
        """Count the queries of all requests, or what they may be at most."""
        return self.facts.tokens

    @property
    def entries(self) -> int:
        """Count the rows, or the pages, of all requests."""
        return self.facts.entries

    @property
    def addresses(self) -> Dict[str, int]:
        """Return where the planner finds them."""
        start, requests = self.own.data_ptr(), self.num_requests
        return {
            "q_indptr": start,
            "kv_indptr": start + 4 * (requests + 1),
            "kv_len": start + 8 * (requests + 1),
            "num_requests": requests,
        }

    @property
    def q_indptr(self) -> torch.Tensor:
        """Return where the queries of each request begin: int32 [B + 1]. Waits for a GPU."""
        return self.own[: self.num_requests + 1].cpu()

    @property
    def kv_indptr(self) -> torch.Tensor:
        """Return where the rows or pages of each request begin: int32 [B + 1]. Waits for a GPU."""
        return self.own[self.num_requests + 1 : 2 * self.num_requests + 2].cpu()

    @property
    def kv_len(self) -> torch.Tensor:
        """Return the keys of each request: int32 [B]. Waits for a GPU."""
        return self.own[2 * self.num_requests + 2 :].cpu()

    def planned_into(self, own: torch.Tensor) -> Lengths:
        """Return these lengths of a GPU as they were planned: their copy in `own` is where another plan reads them."""
        requests, page_size = self.num_requests, 1 if self.source is None else self.source.page_size
        parts = own[: requests + 1], own[requests + 1 : 2 * requests + 2], own[2 * requests + 2 :]
        return self._replace(own=own, source=Source(*parts, page_size=page_size, last_pages=False))


def one_query_each(requests: int) -> Queries:
    """Return the queries of a decode batch."""
    return Queries(None, requests)


def host_queries(q_indptr: torch.Tensor) -> Queries:
    """Check q_indptr, int32 [B + 1]. Whether it decreases is seen where it is read."""
    check_int32("q_indptr", q_indptr)
    if q_indptr.shape[0] == 0:
        raise InvalidArgumentError("q_indptr must have one element more than there are requests, got none")
    return Queries(q_indptr, q_indptr.shape[0] - 1)


def native_lengths(
    q_indptr: torch.Tensor,
    kv_indptr: Optional[torch.Tensor],
    kv_len: Optional[torch.Tensor],
    page_size: Optional[int],
    max_q_len: Optional[int] = None,
    max_pages: Optional[int] = None,
    max_tokens: Optional[int] = None,
) -> Lengths:
    """Check the lengths of the native operator and copy those on the host; see `plan_attention`."""
    queries = host_queries(q_indptr)
    if page_size is not None:
        check_page_size(page_size)
        if kv_len is None:
            raise InvalidArgumentError("kv_len is needed with pages: the last page of a request may be part full")
    if kv_indptr is None or max_pages is not None:
        kv_indptr = _row_starts(queries.requests, kv_indptr, page_size, max_pages, kv_len)
    check_int32("kv_indptr", kv_indptr, queries.requests + 1)
    if kv_len is not None:
        check_int32("kv_len", kv_len, queries.requests)
    source = Source(queries.indptr, kv_indptr, kv_len, page_size or 1, last_pages=False)
    if max_q_len is not None and max_tokens is None:
        max_tokens = max_q_len * queries.requests
    lengths = _take(source, queries.requests, max_q_len, max_tokens)
    if max_q_len is not None and lengths.facts.longest > max_q_len:
        raise InvalidArgumentError(f"a request has {lengths.facts.longest} queries, but max_q_len is {max_q_len}")
    if max_tokens is not None and lengths.tokens > max_tokens:
        raise InvalidArgumentError(f"the batch has {lengths.tokens} queries, but max_tokens is {max_tokens}")
    return lengths._replace(max_pages=max_pages)


def _row_starts(
    requests: int,
    kv_indptr: Optional[torch.Tensor],
    page_size: Optional[int],
    max_pages: Optional[int],
    kv_len: Optional[torch.Tensor],
) -> torch.Tensor:
    """Return where the rows of a page table [requests, max_pages] begin, on the device of kv_len."""
    if kv_indptr is not None or page_size is None or max_pages is None:
        raise InvalidArgumentError(
            "give either kv_indptr, or with pages max_pages, the width of a page table with a row for each request"
        )
    if not 0 <= check_integer("max_pages", max_pages) <= _INT32_MAX // max(requests, 1):
        raise InvalidArgumentError(f"a page table of {requests} x {max_pages} entries is more than int32 counts")
    where = torch.device("cpu") if kv_len is None or kv_len.device.type != "cuda" else kv_len.device
    return torch.arange(requests + 1, dtype=torch.int32, device=where) * max_pages


def paged_lengths(queries: Queries, indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> Lengths:
    """Check and copy the lengths of a page table in FlashInfer's form: int32 [B + 1] and [B].

    Raises where a last page is empty or overfull; a request may have no page, and then that is not read.
    """
    check_int32("paged_kv_indptr", indptr, queries.requests + 1)
    check_int32("last_page_len", last_page_len, queries.requests)
    check_page_size(page_size)
    source = Source(queries.indptr, indptr, last_page_len, page_size, last_pages=True)
    if queries.indptr is None:
        return _take(source, queries.requests, 1, queries.requests)
    return _take(source, queries.requests, None, None)


def check_page_size(page_size: int) -> None:
    """Raise unless a page has at least one token, and no more than kernels can count."""
    if not 1 <= check_integer("page_size", page_size) <= _INT32_MAX:
        raise InvalidArgumentError(f"page_size must be at least 1 and fit int32, got {page_size}")


def _take(source: Source, requests: int, most_queries: Optional[int], most_tokens: Optional[int]) -> Lengths:
    """Leave lengths on a GPU where all are there and their maxima are known; else read them on the host."""
    devices = {x.device for x in (source.q_indptr, source.kv_indptr, source.keys) if x is not None}
    if (
        most_queries is None
        or most_tokens is None
        or {device.type for device in devices} != {"cuda"}
        or len(devices) > 1
    ):
        return read(source, requests, most_queries)
    facts = planner.Facts(most_tokens, most_queries, 0)
    return Lengths(source.kv_indptr[:0], requests, facts, most_queries, source=source)


def read(source: Source, requests: int, most_queries: Optional[int]) -> Lengths:
    """Check and copy lengths on the host; those on a GPU are copied back first, which waits."""
    q_indptr = None if source.q_indptr is None else _on_host("q_indptr", source.q_indptr)
    kv_indptr = _on_host("kv_indptr", source.kv_indptr)
    name = "last_page_len" if source.last_pages else "kv_len"
    keys = None if source.keys is None else _on_host(name, source.keys)
    own = torch.empty(3 * requests + 2, dtype=torch.int32, device="cpu")
    facts = planner.read_lengths(
        q_indptr=0 if q_indptr is None else q_indptr.data_ptr(),
        kv_indptr=kv_indptr.data_ptr(),
        keys=0 if keys is None else keys.data_ptr(),
        num_requests=requests,
        page_size=source.page_size,
        last_pages=source.last_pages,
        out=own.data_ptr(),
    )
    return Lengths(own, requests, facts, most_queries)


def _on_host(name: str, lengths: torch.Tensor) -> torch.Tensor:
    if lengths.device.type == "cpu":
        return lengths
    check_readable(name, lengths)
    refuse_capture(lengths.device)
    return lengths.cpu()
