"""The typed front of the planner: lengths in host memory become the work list that kernels on every target read.

The schedule itself is kernels/core/plan.h. Addresses are integers (`tensor.data_ptr()`), sizes are bytes, lengths are
int32. The buffers' sizes follow from maxima, never from the lengths of one batch, so a captured CUDA graph replays
with any batch up to them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, NamedTuple

from flashinfer_core.errors import InvalidArgumentError, WorkspaceError


class Shape(NamedTuple):
    """What the kernels and the problem fix.

    group: query heads of a KV head. tile_rows: packed rows of a tile. kv_tile: keys of a tile. causal: query i of a
    request sees keys up to i + kv_len - q_len; window_left: and from window_left before that on, -1: from 0.
    fixed_piece: key tiles of a piece, or more where the request alone says so: then pieces do not depend on what else
    is in the batch. 0: pieces follow the workers' equal shares.
    """

    group: int
    kv_heads: int
    tile_rows: int
    kv_tile: int
    causal: bool
    num_workers: int
    window_left: int = -1
    fixed_piece: int = 0


class Facts(NamedTuple):
    """What lengths add up to: queries of all requests and of the longest one, and rows or pages of all requests."""

    tokens: int
    longest: int
    entries: int


class PlanCounts(NamedTuple):
    """What one plan holds: work items, merges, rows of the partial buffers in use, bytes of its own buffer in use."""

    num_items: int
    num_merges: int
    partial_rows: int
    used_bytes: int


class PlanLimits(NamedTuple):
    """What no plan of some maxima exceeds: merges, and bytes of its buffer with room for so many merges."""

    merges: int
    bytes: int


class PlanOffsets(NamedTuple):
    """Byte offsets in a plan's buffer, which begins with int32 worker_indptr[num_workers + 1].

    arrivals: int32 for each merge, 0 when the plan arrives. A kernel in which the last piece of a tile to arrive merges
    it counts there and leaves 0 behind, so that the plan can run again.
    """

    num_merges: int
    merges: int
    arrivals: int
    items: int


class Scratch(NamedTuple):
    """Byte offsets of the arrays that a planning kernel needs beside `PlanSums before[num_requests + 1]`; all bytes."""

    ends: int
    cuts: int
    bytes: int


class UniformPlan(NamedTuple):
    """One request in equal pieces; the fields of `UniformWork` that the request's lengths do not give, and totals."""

    tiles: int
    pieces: int
    piece_len: int
    num_items: int
    partial_rows: int


def read_lengths(
    *, q_indptr: int, kv_indptr: int, keys: int, num_requests: int, page_size: int, last_pages: bool, out: int
) -> Facts:
    """Check the lengths of a batch, and write q_indptr, kv_indptr and kv_len, one after another, to `out`.

    All are addresses of int32 in host memory. q_indptr: [num_requests + 1]; 0: each request has one query. kv_indptr:
    [num_requests + 1], rows, or with pages entries of the page table. keys: [num_requests], the keys of each request,
    or with last_pages those in its last page, not read where it has no page; 0: all rows count. page_size: 1 without
    pages. out: [3 * num_requests + 2]. Raises InvalidArgumentError that names the request.
    """
    return Facts._make(_call(_host().read_lengths, q_indptr, kv_indptr, keys, num_requests, page_size, last_pages, out))


def plan(
    shape: Shape,
    *,
    q_indptr: int,
    kv_indptr: int,
    kv_len: int,
    num_requests: int,
    max_partial_rows: int,
    max_merges: int,
    out: int,
    out_bytes: int,
) -> PlanCounts:
    """Write the plan of a batch to host memory at `out`.

    q_indptr, kv_indptr: addresses of int32 [num_requests + 1] in host memory, tokens of q, and ragged rows or
    page-table entries. kv_len: address of int32 [num_requests], keys of each request.
    max_partial_rows: rows that the partial buffers have; fewer than `useful_partial_rows` only make the pieces less
    equal, and 0 means that no tile is split. max_merges: for which `plan_offsets` leaves room.
    Raises InvalidArgumentError for lengths that decrease or are negative, WorkspaceError where `out_bytes` is less
    than the plan may take (those of `plan_limits` always suffice), or where pieces of fixed length need more partial
    rows than there are; nothing is written then.
    The schedule is stream-K (Osama et al. 2023, arXiv:2301.03598), over keys.
    """
    return PlanCounts._make(
        _call(
            _host().plan, _native(shape), q_indptr, kv_indptr, kv_len, num_requests, max_partial_rows, max_merges, out,
            out_bytes,
        )
    )  # fmt: skip


def fixed_rows(shape: Shape, *, q_indptr: int, kv_indptr: int, kv_len: int, num_requests: int) -> int:
    """Return the rows of the partial buffers that pieces of fixed length need; arguments as `plan`."""
    return int(_call(_host().fixed_rows, _native(shape), q_indptr, kv_indptr, kv_len, num_requests))


def most_fixed_rows(shape: Shape, *, max_q_len: int, max_kv_len: int) -> int:
    """Return what `fixed_rows` gives at most for one request of these maxima."""
    return int(_call(_host().most_fixed_rows, _native(shape), max_q_len, max_kv_len))


def scratch(num_requests: int, num_workers: int) -> Scratch:
    """Return where the arrays of cuts.h lie behind one another."""
    ends = _aligned(24 * (num_requests + 1))
    cuts = ends + 16 * num_workers
    return Scratch(ends, cuts, cuts + 12 * num_workers)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def plan_limits(shape: Shape, *, total_q: int, num_requests: int) -> PlanLimits:
    """Return what no plan for at most `total_q` tokens of q in `num_requests` requests exceeds."""
    return PlanLimits._make(_call(_host().plan_limits, _native(shape), total_q, num_requests))


@lru_cache(maxsize=None)
def plan_offsets(num_workers: int, max_merges: int) -> PlanOffsets:
    """Return where the parts of a plan's buffer begin."""
    return PlanOffsets._make(_host().plan_offsets(num_workers, max_merges))


def uniform_plan(shape: Shape, *, q_len: int, kv_len: int, max_partial_rows: int) -> UniformPlan:
    """Split one request into equal pieces that fill the workers; needs no memory on the device.

    Arguments are as in `plan`. Raises InvalidArgumentError for negative lengths.
    """
    return UniformPlan._make(_call(_host().uniform_plan, _native(shape), q_len, kv_len, max_partial_rows))


def useful_partial_rows(tile_rows: int, num_workers: int) -> int:
    """Return the partial rows beyond which more change nothing, whatever the batch.

    Each of the num_workers - 1 cuts between workers adds at most two pieces.
    """
    return 2 * (num_workers - 1) * tile_rows


@lru_cache(maxsize=4096)
def _native(shape: Shape) -> Any:
    try:
        return _host().PlanShape(*shape)
    except TypeError as error:  # an integer beyond its C++ type arrives as this
        raise InvalidArgumentError(f"an argument is not an integer that fits: {error}") from None


def _host() -> Any:
    from flashinfer_core import _host  # not above: importing the planner loads no extension

    return _host


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        if isinstance(error, _host().BufferTooSmallError):
            raise WorkspaceError(str(error), remedy="size it with plan_limits for the largest batch") from None
        if isinstance(error, _host().PartialTooSmallError):
            raise WorkspaceError(
                str(error), remedy="size it with workspace_bytes(deterministic=True) for the largest batch"
            ) from None
        raise InvalidArgumentError(str(error)) from None
    except TypeError as error:  # an integer beyond its C++ type arrives as this
        raise InvalidArgumentError(f"an argument is not an integer that fits: {error}") from None
