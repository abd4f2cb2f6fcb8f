"""A plan: the work list of a batch on its device, and parameter structs that wait for their pointers.

Planning happens where the lengths are, and then waits for nothing; lengths on a GPU whose maxima nobody gave are
copied back first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from flashinfer_attention.checks import Problem, is_capturing, make_problem, refuse_capture
from flashinfer_attention.device_plan import plan_on_device
from flashinfer_attention.launch import (
    Kernels,
    Partial,
    allocate_partial,
    copied,
    fixed_piece,
    load_kernels,
    place_partial,
    structures,
)
from flashinfer_attention.lengths import Lengths, native_lengths, read
from flashinfer_attention.ops import number_for
from flashinfer_attention.workspace import Frozen, Workspace
from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError
from flashinfer_core.kernel import Step
from flashinfer_core.page_table import check_pages, is_checked
from flashinfer_core.tensors import KeyValue, check_tensor

_INT32_MAX = 2**31 - 1
_ANY_LENGTH = 1 << 20  # queries, beyond every tile


@dataclass(frozen=True, eq=False)
class Plan:
    """What `attention` runs.

    On CPUs any number of threads may run it at once. On a GPU its runs share the workspace's partial buffer, so they
    belong to one stream at a time, and a newer plan in the same workspace ends it.
    """

    problem: Problem
    page_size: Optional[int]  # None: keys are ragged
    kernels: Kernels
    workspace: Workspace
    lengths: Lengths
    checks_pages: bool
    is_empty: bool
    merge_workers: int  # 0: there is nothing to merge
    attention_params: Any
    merge_params: Any
    work: torch.Tensor  # the work list, to which the params point
    generation: int  # of `work`
    partial: Partial
    calls: Dict[Any, Any] = field(default_factory=dict)  # accepted ones of the native operator, see call.py
    number: int = field(init=False)  # under which compiled graphs find it

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", number_for(self))

    @property
    def tokens(self) -> int:
        """Count the rows of q."""
        return self.lengths.tokens

    def check_cache(self, kv: KeyValue, page_table: Optional[torch.Tensor]) -> None:
        """Raise unless the cache and its table can hold what was planned."""
        if self.page_size is None:
            if page_table is not None:
                raise InvalidArgumentError("page_table was given, but the plan is for ragged keys (page_size=None)")
            if kv.pages < self.lengths.entries:
                raise InvalidArgumentError(f"k and v must have at least {self.lengths.entries} rows, got {kv.pages}")
            return
        if kv.page_size != self.page_size:
            raise InvalidArgumentError(f"the plan is for pages of {self.page_size} tokens, got {kv.page_size}")
        if page_table is None:
            raise InvalidArgumentError("the plan is for paged keys, but page_table is missing")
        width = self.lengths.max_pages
        shape = (None,) if width is None else (None, width)
        check_tensor("page_table", page_table, shape, torch.int32, self.problem.device)
        if page_table.numel() < self.lengths.entries:
            raise InvalidArgumentError(
                f"page_table must have at least {self.lengths.entries} entries, got {page_table.numel()}"
            )
        if not page_table.is_contiguous():
            raise InvalidArgumentError(
                f"page_table must be contiguous, got strides {page_table.stride()}",
                remedy="plan with max_pages as wide as the rows lie apart, and pass whole rows",
            )
        self.check_pages(kv.pages, page_table)

    def check_pages(self, pages: int, page_table: torch.Tensor) -> None:
        """Raise where the table names a page that a cache of so many has not, if tables are checked."""
        if self.page_size is None or not self.checks_pages or is_capturing(self.problem.device):
            return
        lengths = self.lengths
        check_pages(
            page_table.view(-1),
            lengths.q_indptr,
            lengths.kv_indptr,
            lengths.kv_len,
            page_size=self.page_size,
            pages=pages,
            window_left=self.problem.window_left,
        )

    def check_current(self, rows: int, page_table: Optional[torch.Tensor]) -> None:
        """Raise where a newer plan replaced this one; while a CUDA graph captures, note what it holds."""
        self.workspace.check_generation(self.work, self.generation)
        if is_capturing(self.problem.device):
            self.workspace.note_capture(rows, (self.work, page_table))

    def steps(self, attention: Any, merge: Any, *, general: bool, rotary: bool) -> List[Step]:
        """Return the launches of a call with these params."""
        steps = [Step(self.kernels.attention_for(general=general, rotary=rotary), attention, self.kernels.workers)]
        if self.merge_workers:
            steps.append(Step(self.kernels.merge, merge, self.merge_workers))
        return steps


def plan_attention(
    *,
    q_indptr: torch.Tensor,
    kv_indptr: Optional[torch.Tensor] = None,
    kv_len: Optional[torch.Tensor] = None,
    max_pages: Optional[int] = None,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: Optional[int] = None,
    page_size: Optional[int] = None,
    causal: bool = False,
    window_left: int = -1,
    has_mask: bool = False,
    deterministic: bool = False,
    max_q_len: Optional[int] = None,
    max_tokens: Optional[int] = None,
    dtype: torch.dtype,
    kv_dtype: Optional[torch.dtype] = None,
    device: Union[torch.device, str],
    workspace: Optional[Workspace] = None,
) -> Plan:
    """Turn lengths into equal pieces of work for the workers of `device`.

    q_indptr: int32 [B + 1], rows of q of each request. kv_indptr: int32 [B + 1], rows of k and v (ragged: page_size is
    None) or entries of the page table. kv_len: int32 [B], keys of each request; None only where ragged, and then all
    rows count. max_pages: in the place of kv_indptr, the page table is [B, max_pages], a row for each request. Lengths
    of 0 are legal, as is B = 0. head_dim_vo: columns of v and o; None: head_dim. causal: query i of a request sees keys
    up to i + kv_len - q_len. window_left: and from i + kv_len - q_len - window_left on, so it sees window_left + 1
    keys; -1: no window. has_mask: calls bring a mask, which takes the place of causal. deterministic: a request's
    result has the same bits whatever the batch around it, for the same max_q_len. max_q_len: what no request of any
    batch has more queries than; None: any number. dtype: of q and o. kv_dtype: of k and v: that of q, float8_e4m3fn or
    float8_e5m2; None: that of q. workspace: where the plan writes; None: allocated for this plan.
    Nothing waits for a device where lengths are on the host, or where all are on the GPU and max_q_len is given: these
    are planned there, max_tokens (None: max_q_len of each request) are then the rows of q, and a batch beyond these
    maxima, or without sense, leaves outputs as they are. Other tensors on a GPU are copied back, which waits. Lengths
    may be written again when this returns; those on a GPU by work behind it on its stream.
    Raises InvalidArgumentError (lengths that decrease, head counts that do not divide), InvalidTypeError (lengths that
    are not int32), UnsupportedOptionError (dtype, head_dim), WorkspaceError.
    """
    problem = make_problem(
        num_qo_heads,
        num_kv_heads,
        head_dim,
        causal,
        dtype,
        torch.device(device),
        head_dim_vo=head_dim_vo,
        kv_dtype=kv_dtype,
        window_left=window_left,
        has_mask=has_mask,
        deterministic=deterministic,
    )
    lengths = native_lengths(q_indptr, kv_indptr, kv_len, page_size, max_q_len, max_pages, max_tokens)
    return plan_lengths(problem, page_size, lengths, workspace)


def plan_lengths(
    problem: Problem, page_size: Optional[int], lengths: Lengths, workspace: Optional[Workspace] = None
) -> Plan:
    """Plan lengths that were taken already; the rest of `plan_attention`."""
    refuse_capture(problem.device)
    there = lengths.source
    if there is not None and (is_checked(problem.device) or there.kv_indptr.device != problem.device):
        lengths = read(there, lengths.num_requests, lengths.most_queries)
    kernels = _kernels(problem, page_size, lengths, workspace)
    shape = _shape(problem, kernels)
    workspace, partial = _room(problem, kernels, shape, lengths, workspace)
    frozen = workspace.frozen
    limits = frozen.limits if frozen else _limits(shape, lengths)
    # What a captured graph does is decided on the device: another plan may bring tokens, and as many merges as fit.
    merges = limits.merges if partial.rows > 0 else 0
    if lengths.source is not None:
        uploaded = workspace.receive(limits.bytes)
        lengths = plan_on_device(shape, limits, partial.rows, lengths, uploaded)
    else:
        slot = workspace.stage(limits.bytes)
        counts = planner.plan(
            shape,
            **lengths.addresses,
            max_partial_rows=partial.rows,
            max_merges=limits.merges,
            out=slot.buffer.data_ptr(),
            out_bytes=limits.bytes,
        )
        uploaded = workspace.upload(slot, counts.used_bytes, limits.bytes if workspace.fixed else counts.used_bytes)
        merges = merges if workspace.fixed else counts.num_merges
    if workspace.fixed and frozen is None:
        workspace.freeze(Frozen(problem, page_size, kernels, partial, limits), lengths.tokens)
    attention_params, merge_params = _params(problem, page_size, kernels)
    _point(attention_params, merge_params, partial, uploaded.data_ptr(), kernels.workers, limits)
    return Plan(
        problem=problem,
        page_size=page_size,
        kernels=kernels,
        workspace=workspace,
        lengths=lengths,
        checks_pages=is_checked(problem.device),
        is_empty=lengths.tokens == 0 and not workspace.fixed,
        merge_workers=kernels.merge_workers(merges),
        attention_params=attention_params,
        merge_params=merge_params,
        work=uploaded,
        generation=workspace.generation,
        partial=partial,
    )


def _kernels(problem: Problem, page_size: Optional[int], lengths: Lengths, workspace: Optional[Workspace]) -> Kernels:
    """Return the kernels that a captured graph has, or else the best ones; for a deterministic plan, always the same.

    Tiles of other sizes add up in another order, so the batch must not choose: what the caller says of all batches may.
    """
    if workspace is not None and workspace.frozen is not None:
        workspace.check_fits(problem, page_size, lengths.tokens)
        return workspace.frozen.kernels
    longest = lengths.facts.longest
    if problem.deterministic:
        longest = _ANY_LENGTH if lengths.most_queries is None else lengths.most_queries
    return load_kernels(problem, longest * problem.group)


def _shape(problem: Problem, kernels: Kernels) -> planner.Shape:
    return planner.Shape(
        kernels.tile_group,
        kernels.tile_kv_heads,
        kernels.tile_rows,
        kernels.kv_tile,
        problem.causal,
        kernels.workers,
        problem.window_left,
        fixed_piece(kernels.kv_tile) if problem.deterministic else 0,
    )


def _room(
    problem: Problem, kernels: Kernels, shape: planner.Shape, lengths: Lengths, workspace: Optional[Workspace]
) -> Tuple[Workspace, Partial]:
    """Return where the partial results go: as a captured graph has them, else as is best."""
    if workspace is not None and workspace.frozen is not None:
        return workspace, workspace.frozen.partial
    useful = _INT32_MAX if problem.deterministic else kernels.useful_partial_rows
    needed = _fixed_rows(shape, lengths) if problem.deterministic else useful
    if workspace is None:
        workspace = Workspace(allocate_partial(needed, problem.head_dim_vo, problem.device).buffer)
    partial = place_partial(workspace.partial, problem.head_dim_vo, useful)
    if lengths.source is not None and problem.deterministic and partial.rows < needed:
        raise WorkspaceError(
            f"lengths on a GPU may need {needed} partial rows, but their buffer has {partial.rows}",
            remedy="give the workspace more memory, or the lengths on the host",
        )
    return workspace, partial


def _fixed_rows(shape: planner.Shape, lengths: Lengths) -> int:
    if lengths.source is None:
        return planner.fixed_rows(shape, **lengths.addresses)
    longest = _INT32_MAX - shape.kv_tile
    return lengths.num_requests * planner.most_fixed_rows(shape, max_q_len=lengths.facts.longest, max_kv_len=longest)


def _limits(shape: planner.Shape, lengths: Lengths) -> planner.PlanLimits:
    return planner.plan_limits(shape, total_q=lengths.tokens, num_requests=lengths.num_requests)


@lru_cache(maxsize=256)
def _templates(problem: Problem, page_size: Optional[int], kernels: Kernels) -> Tuple[Any, Any]:
    """Return the parameter structs of a plan without what each plan has of its own."""
    attention_type, merge_type = structures()
    attention = attention_type(
        kv_heads=problem.num_kv_heads,
        group=problem.group,
        head_dim=problem.head_dim,
        head_dim_vo=problem.head_dim_vo,
        page_size=page_size or 1,
        causal=problem.causal,
        window_left=problem.window_left,
    )
    merge = merge_type(
        tile_rows=kernels.tile_rows,
        kv_heads=kernels.tile_kv_heads,
        group=kernels.tile_group,
        head_dim_vo=problem.head_dim_vo,
    )
    return attention, merge


def _params(problem: Problem, page_size: Optional[int], kernels: Kernels) -> Tuple[Any, Any]:
    attention, merge = _templates(problem, page_size, kernels)
    return copied(attention), copied(merge)


def _point(
    attention: Any, merge: Any, partial: Partial, work: int, num_workers: int, limits: planner.PlanLimits
) -> None:
    """Point the parameter structs to a work list and the partial results."""
    offsets = planner.plan_offsets(num_workers, limits.merges)
    attention.partial_o = merge.partial_o = partial.o
    attention.partial_lse = merge.partial_lse = partial.lse
    attention.worker_indptr = work
    attention.items = work + offsets.items
    merge.merges = work + offsets.merges
    merge.num_merges = work + offsets.num_merges
