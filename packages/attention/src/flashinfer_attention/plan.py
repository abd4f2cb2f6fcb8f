"""A plan: the work list of a batch on its device, and parameter structs that wait for their pointers.

Planning happens on the host. Lengths in host memory cost no synchronisation; lengths on a GPU are copied back first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch

from flashinfer_attention.checks import Problem, is_capturing, make_problem, refuse_capture
from flashinfer_attention.launch import (
    Kernels,
    Partial,
    allocate_partial,
    load_kernels,
    place_partial,
    stream_of,
    structures,
)
from flashinfer_attention.lengths import Lengths, host_lengths
from flashinfer_attention.workspace import Frozen, Workspace
from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.kernel import Kernel
from flashinfer_core.page_table import check_pages, is_checked
from flashinfer_core.tensors import KeyValue, check_tensor


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

    @property
    def tokens(self) -> int:
        """Count the rows of q."""
        return self.lengths.queries.tokens

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
        check_tensor("page_table", page_table, (None,), torch.int32, self.problem.device)
        if page_table.shape[0] < self.lengths.entries:
            raise InvalidArgumentError(
                f"page_table must have at least {self.lengths.entries} entries, got {page_table.shape[0]}"
            )
        if self.checks_pages and not is_capturing(self.problem.device):
            lengths = self.lengths
            check_pages(
                page_table,
                lengths.queries.indptr,
                lengths.kv_indptr,
                lengths.kv_len,
                page_size=self.page_size,
                pages=kv.pages,
                window_left=self.problem.window_left,
            )

    def check_current(self, rows: int, page_table: Optional[torch.Tensor]) -> None:
        """Raise where q is too short or a newer plan replaced this one; while a graph captures, note what it holds."""
        if rows < self.tokens:
            raise InvalidArgumentError(f"q must have at least the {self.tokens} planned rows, got {rows}")
        self.workspace.check_generation(self.work, self.generation)
        if is_capturing(self.problem.device):
            self.workspace.note_capture(rows, (self.work, page_table))

    def launch(self, attention: Any, merge: Any, general: bool) -> None:
        """Launch both kernels with copies of the params that are filled in."""
        kernel = self.kernels.attention_for(general)
        workspace = self.workspace
        stream = stream_of(self.problem.device)
        if not self.merge_workers or not self.problem.is_cpu:
            self._launch(kernel, attention, merge, stream)
        elif workspace.partial_lock.acquire(blocking=False):
            try:
                self._launch(kernel, attention, merge, stream)
            finally:
                workspace.partial_lock.release()
        else:
            own = allocate_partial(self.partial.rows, self.problem.head_dim_vo, self.problem.device)
            attention.partial_o = merge.partial_o = own.place.o
            attention.partial_lse = merge.partial_lse = own.place.lse
            self._launch(kernel, attention, merge, stream)

    def _launch(self, kernel: Kernel, attention: Any, merge: Any, stream: int) -> None:
        kernel.launch(attention, workers=self.kernels.workers, stream=stream)
        if self.merge_workers:
            self.kernels.merge.launch(merge, workers=self.merge_workers, stream=stream)


def plan_attention(
    *,
    q_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_len: Optional[torch.Tensor] = None,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: Optional[int] = None,
    page_size: Optional[int] = None,
    causal: bool = False,
    window_left: int = -1,
    has_mask: bool = False,
    deterministic: bool = False,
    dtype: torch.dtype,
    kv_dtype: Optional[torch.dtype] = None,
    device: Union[torch.device, str],
    workspace: Optional[Workspace] = None,
) -> Plan:
    """Turn lengths into equal pieces of work for the workers of `device`.

    q_indptr: int32 [B + 1], rows of q of each request. kv_indptr: int32 [B + 1], rows of k and v (ragged: page_size is
    None) or entries of the page table. kv_len: int32 [B], keys of each request; None only where ragged, and then all
    rows count. Lengths of 0 are legal, as is B = 0. head_dim_vo: columns of v and o; None: head_dim. causal: query i of
    a request sees keys up to i + kv_len - q_len. window_left: and from i + kv_len - q_len - window_left on, so it sees
    window_left + 1 keys; -1: no window. has_mask: calls bring a mask, which takes the place of causal. deterministic:
    a request's result has the same bits whatever the batch around it. dtype: of q and o. kv_dtype: of k and v: that of
    q, float8_e4m3fn or float8_e5m2; None: that of q. workspace: where the plan writes; None: allocated for this plan.
    Tensors on a GPU are copied to the host, which waits for the device; host tensors cost no synchronisation. Reads
    lengths before it returns. Raises InvalidArgumentError (lengths that decrease, head counts that do not divide),
    InvalidTypeError (lengths that are not int32), UnsupportedOptionError (dtype, head_dim), WorkspaceError.
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
    lengths = host_lengths(q_indptr, kv_indptr, kv_len, page_size)
    return plan_lengths(problem, page_size, lengths, workspace)


def plan_lengths(
    problem: Problem, page_size: Optional[int], lengths: Lengths, workspace: Optional[Workspace] = None
) -> Plan:
    """Plan lengths that are on the host already; the rest of `plan_attention`."""
    refuse_capture(problem.device)
    kernels, partial, workspace = _room(problem, page_size, lengths, workspace)
    work = _write(problem, lengths, kernels, partial)
    fixes_now = workspace.fixed and workspace.frozen is None
    uploaded = workspace.upload(work.host, work.used_bytes, work.host.numel() if fixes_now else work.used_bytes)
    if fixes_now:
        workspace.freeze(Frozen(problem, page_size, kernels, partial), lengths.queries.tokens)
    merges = work.num_merges
    if workspace.fixed:
        merges = kernels.workers - 1 if partial.rows > 0 else 0
    return Plan(
        problem=problem,
        page_size=page_size,
        kernels=kernels,
        workspace=workspace,
        lengths=lengths,
        checks_pages=is_checked(problem.device),
        # What a captured graph does is decided on the device: another plan may bring tokens, and as many merges as
        # there are cuts between workers.
        is_empty=lengths.queries.tokens == 0 and not workspace.fixed,
        merge_workers=kernels.merge_workers(merges),
        attention_params=_attention_params(problem, page_size, kernels, partial, uploaded.data_ptr()),
        merge_params=_merge_params(problem, kernels, partial, uploaded.data_ptr()),
        work=uploaded,
        generation=workspace.generation,
        partial=partial,
    )


def _room(
    problem: Problem, page_size: Optional[int], lengths: Lengths, workspace: Optional[Workspace]
) -> Tuple[Kernels, Partial, Workspace]:
    """Return the kernels, and where their partial results go: as a captured graph has them, else as is best."""
    if workspace is not None and workspace.frozen is not None:
        workspace.check_fits(problem, page_size, lengths.queries.tokens)
        return workspace.frozen.kernels, workspace.frozen.partial, workspace
    kernels = load_kernels(problem, lengths.queries.longest * problem.group)
    if workspace is None:
        workspace = Workspace(allocate_partial(kernels.useful_partial_rows, problem.head_dim_vo, problem.device).buffer)
    return kernels, place_partial(workspace.partial, problem.head_dim_vo, kernels.useful_partial_rows), workspace


class _Work(NamedTuple):
    """A work list in host memory, pinned for a GPU."""

    host: torch.Tensor
    used_bytes: int
    num_merges: int


def _write(problem: Problem, lengths: Lengths, kernels: Kernels, partial: Partial) -> _Work:
    bound = planner.plan_bytes(
        total_q=lengths.queries.tokens,
        num_requests=lengths.num_requests,
        group=kernels.tile_group,
        kv_heads=kernels.tile_kv_heads,
        tile_rows=kernels.tile_rows,
        num_workers=kernels.workers,
    )
    host = torch.empty(bound, dtype=torch.uint8, device="cpu", pin_memory=not problem.is_cpu)
    counts = planner.plan(
        q_indptr=lengths.queries.indptr.data_ptr(),
        kv_indptr=lengths.kv_indptr.data_ptr(),
        kv_len=lengths.kv_len.data_ptr(),
        num_requests=lengths.num_requests,
        group=kernels.tile_group,
        kv_heads=kernels.tile_kv_heads,
        tile_rows=kernels.tile_rows,
        kv_tile=kernels.kv_tile,
        causal=problem.causal,
        num_workers=kernels.workers,
        max_partial_rows=partial.rows,
        out=host.data_ptr(),
        out_bytes=bound,
    )
    return _Work(host, counts.used_bytes, counts.num_merges)


def _attention_params(problem: Problem, page_size: Optional[int], kernels: Kernels, partial: Partial, work: int) -> Any:
    return structures()[0](
        partial_o=partial.o,
        partial_lse=partial.lse,
        items=work + planner.plan_offsets(kernels.workers).items,
        worker_indptr=work,
        kv_heads=problem.num_kv_heads,
        group=problem.group,
        head_dim=problem.head_dim,
        head_dim_vo=problem.head_dim_vo,
        page_size=page_size or 1,
        causal=problem.causal,
        window_left=problem.window_left,
    )


def _merge_params(problem: Problem, kernels: Kernels, partial: Partial, work: int) -> Any:
    offsets = planner.plan_offsets(kernels.workers)
    return structures()[1](
        partial_o=partial.o,
        partial_lse=partial.lse,
        merges=work + offsets.merges,
        num_merges=work + offsets.num_merges,
        tile_rows=kernels.tile_rows,
        kv_heads=kernels.tile_kv_heads,
        group=kernels.tile_group,
        head_dim_vo=problem.head_dim_vo,
    )
