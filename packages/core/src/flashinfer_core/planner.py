"""The typed front of the planner: lengths in host memory become the work list that kernels on every target read.

The schedule itself is kernels/core/plan.h. Addresses are integers (`tensor.data_ptr()`), sizes are bytes, lengths are
int32. The buffers' sizes follow from maxima, never from the lengths of one batch, so a captured CUDA graph replays
with any batch up to them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, NamedTuple

from flashinfer_core.errors import InvalidArgumentError, WorkspaceError


class PlanCounts(NamedTuple):
    """What one plan holds: work items, merges, rows of the partial buffers in use, bytes of its own buffer in use."""

    num_items: int
    num_merges: int
    partial_rows: int
    used_bytes: int


class PlanOffsets(NamedTuple):
    """Byte offsets in a plan's buffer, which begins with int32 worker_indptr[num_workers + 1].

    arrivals: int32 for each merge, 0 when the plan arrives. A kernel in which the last piece of a tile to arrive merges
    it counts there and leaves 0 behind, so that the plan can run again.
    """

    num_merges: int
    merges: int
    arrivals: int
    items: int


class UniformPlan(NamedTuple):
    """One request in equal pieces; the fields of `UniformWork` that the request's lengths do not give, and totals."""

    tiles: int
    pieces: int
    piece_len: int
    num_items: int
    partial_rows: int


def plan(
    *,
    q_indptr: int,
    kv_indptr: int,
    kv_len: int,
    num_requests: int,
    group: int,
    kv_heads: int,
    tile_rows: int,
    kv_tile: int,
    causal: bool,
    window_left: int = -1,
    num_workers: int,
    max_partial_rows: int,
    out: int,
    out_bytes: int,
) -> PlanCounts:
    """Write the plan of a batch to host memory at `out`.

    q_indptr, kv_indptr: addresses of int32 [num_requests + 1] in host memory, tokens of q, and ragged rows or
    page-table entries. kv_len: address of int32 [num_requests], keys of each request.
    group: query heads of a KV head. tile_rows: packed rows of a tile. kv_tile: keys of a tile. causal: query i of a
    request sees keys up to i + kv_len - q_len; window_left: and from window_left before that on, -1: from 0.
    max_partial_rows: rows that the partial buffers have; fewer than `useful_partial_rows` only make the pieces less
    equal, and 0 means that no tile is split.
    Raises InvalidArgumentError for lengths that decrease or are negative, WorkspaceError where `out_bytes` is less
    than the plan may take (`plan_bytes` always suffices); nothing is written then.
    The schedule is stream-K (Osama et al. 2023, arXiv:2301.03598), over keys.
    """
    return PlanCounts._make(
        _call(
            _host().plan, q_indptr, kv_indptr, kv_len, num_requests, group, kv_heads, tile_rows, kv_tile, causal,
            window_left, num_workers, max_partial_rows, out, out_bytes,
        )
    )  # fmt: skip


def uniform_plan(
    *,
    q_len: int,
    kv_len: int,
    group: int,
    kv_heads: int,
    tile_rows: int,
    kv_tile: int,
    causal: bool,
    window_left: int = -1,
    num_workers: int,
    max_partial_rows: int,
) -> UniformPlan:
    """Split one request into equal pieces that fill the workers; needs no memory on the device.

    Arguments are as in `plan`. Raises InvalidArgumentError for negative lengths.
    """
    return UniformPlan._make(
        _call(
            _host().uniform_plan, q_len, kv_len, group, kv_heads, tile_rows, kv_tile, causal, window_left, num_workers,
            max_partial_rows,
        )
    )  # fmt: skip


@lru_cache(maxsize=None)
def plan_offsets(num_workers: int) -> PlanOffsets:
    """Return where the parts of a plan's buffer begin; this depends on the number of workers only."""
    return PlanOffsets._make(_host().plan_offsets(num_workers))


def plan_bytes(*, total_q: int, num_requests: int, group: int, kv_heads: int, tile_rows: int, num_workers: int) -> int:
    """Return the bytes that no plan for at most `total_q` tokens of q in `num_requests` requests exceeds."""
    return int(_host().plan_bytes(total_q, num_requests, group, kv_heads, tile_rows, num_workers))


def useful_partial_rows(tile_rows: int, num_workers: int) -> int:
    """Return the partial rows beyond which more change nothing, whatever the batch.

    Each of the num_workers - 1 cuts between workers adds at most two pieces.
    """
    return 2 * (num_workers - 1) * tile_rows


def _host() -> Any:
    from flashinfer_core import _host  # not above: importing the planner loads no extension

    return _host


def _call(function: Callable[..., Any], *arguments: int) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        if isinstance(error, _host().BufferTooSmallError):
            raise WorkspaceError(str(error), remedy="size it with plan_bytes for the largest batch") from None
        raise InvalidArgumentError(str(error)) from None
    except TypeError as error:  # an integer beyond its C++ type arrives as this
        raise InvalidArgumentError(f"an argument is not an integer that fits: {error}") from None
