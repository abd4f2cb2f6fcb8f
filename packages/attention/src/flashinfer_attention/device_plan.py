"""Plan lengths that lie on a GPU where they are: the host reads nothing and waits for nothing.

The kernel makes the plan that the host would make. What it cannot do is raise: a batch that makes no sense, or is
beyond the maxima that it was announced with, gets a plan without work, and outputs stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer_attention.launch import stream_of
from flashinfer_attention.lengths import Lengths
from flashinfer_attention.variants import PACKAGE, PlanLengths
from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.kernel import load
from flashinfer_core.params import structure

_ITEM_BYTES = 48
_INT32_MAX = 2**31 - 1


def plan_on_device(
    shape: planner.Shape, limits: planner.PlanLimits, partial_rows: int, lengths: Lengths, work: torch.Tensor
) -> Lengths:
    """Launch the kernel that writes the plan to `work`, uint8 [limits.bytes or more]; return the lengths as planned."""
    source, requests = lengths.source, lengths.num_requests
    if source is None:
        raise InvalidArgumentError("lengths on the host are planned there")
    device = work.device
    own = torch.empty(3 * requests + 2, dtype=torch.int32, device=device)
    places = planner.scratch(requests, shape.num_workers)
    # May be freed before the kernel has run: torch gives it to work behind it on this stream only.
    scratch = torch.empty(places.bytes, dtype=torch.uint8, device=device)
    offsets = planner.plan_offsets(shape.num_workers, limits.merges)
    params = _params(shape)
    params.q_indptr = 0 if source.q_indptr is None else source.q_indptr.data_ptr()
    params.kv_indptr = source.kv_indptr.data_ptr()
    params.keys = 0 if source.keys is None else source.keys.data_ptr()
    params.lengths = own.data_ptr()
    params.before = scratch.data_ptr()
    params.ends, params.cuts = params.before + places.ends, params.before + places.cuts
    params.worker_indptr = work.data_ptr()
    for name in ("num_merges", "merges", "arrivals", "items"):
        setattr(params, name, work.data_ptr() + getattr(offsets, name))
    params.max_items = min((limits.bytes - offsets.items) // _ITEM_BYTES, _INT32_MAX)
    params.max_merges = limits.merges
    params.max_pieces = min(partial_rows // shape.tile_rows, _INT32_MAX // shape.tile_rows)
    params.num_requests = requests
    params.max_queries, params.max_tokens = lengths.facts.longest, lengths.tokens
    params.page_size, params.last_pages = source.page_size, source.last_pages
    kernel = load(PlanLengths(), device.index)
    kernel.launch(params, workers=1, stream=stream_of(device))
    return lengths.planned_into(own)


def _params(shape: planner.Shape) -> Any:
    return structure(PACKAGE, "core/plan_params.h", "PlanParams")(**shape._asdict())
