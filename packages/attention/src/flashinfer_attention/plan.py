"""A plan: the work list of a batch on its device, and parameter structs that wait for their pointers.

Planning happens on the host. Lengths in host memory cost no synchronisation; lengths on a GPU are copied back first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Tuple

import torch

from flashinfer_attention.checks import Problem, check_page_table, checks_pages, make_problem
from flashinfer_attention.launch import Kernels, Partial, load_kernels, partial_bytes, place_partial, structures
from flashinfer_attention.lengths import Lengths, host_lengths
from flashinfer_attention.workspace import Frozen, Workspace
from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import KeyValue, check_tensor


@dataclass(frozen=True)
class Plan:
    """What `attention` runs. Holds no lengths but those that its checks need; any number of threads may run it."""

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
    buffers: Tuple[torch.Tensor, ...]  # keeps alive what the params point to

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
        if self.checks_pages and not _is_capturing(self.problem):
            check_page_table(page_table, self.lengths.kv_indptr, self.lengths.kv_len, self.page_size, kv.pages)

    def check_rows(self, rows: int) -> None:
        """Raise unless q of `rows` rows suits a fixed workspace; while a graph captures, hold later plans to it."""
        if rows < self.tokens:
            raise InvalidArgumentError(f"q must have at least the {self.tokens} planned rows, got {rows}")
        if _is_capturing(self.problem):
            self.workspace.note_capture(rows)


def _is_capturing(problem: Problem) -> bool:
    return not problem.is_cpu and torch.cuda.is_current_stream_capturing()


def plan_attention(
    *,
    q_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_len: Optional[torch.Tensor] = None,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: Optional[int] = None,
    causal: bool = False,
    dtype: torch.dtype,
    device: torch.device | str,
    workspace: Optional[Workspace] = None,
) -> Plan:
    """Turn lengths into equal pieces of work for the workers of `device`.

    q_indptr: int32 [B + 1], rows of q of each request. kv_indptr: int32 [B + 1], rows of k and v (ragged: page_size is
    None) or entries of the page table. kv_len: int32 [B], keys of each request; None only where ragged, and then all
    rows count. Lengths of 0 are legal, as is B = 0. causal: query i of a request sees keys up to i + kv_len - q_len.
    dtype: of q, k, v and o. workspace: where the plan writes; None: allocated for this plan.
    Tensors on a GPU are copied to the host, which waits for the device; host tensors cost no synchronisation. Reads
    lengths before it returns. Raises InvalidArgumentError (lengths that decrease, head counts that do not divide),
    InvalidTypeError (lengths that are not int32), UnsupportedOptionError (dtype, head_dim), WorkspaceError.
    """
    problem = make_problem(num_qo_heads, num_kv_heads, head_dim, causal, dtype, torch.device(device))
    lengths = host_lengths(q_indptr, kv_indptr, kv_len, page_size)
    return plan_lengths(problem, page_size, lengths, workspace)


def plan_lengths(
    problem: Problem, page_size: Optional[int], lengths: Lengths, workspace: Optional[Workspace] = None
) -> Plan:
    """Plan lengths that are on the host already; the rest of `plan_attention`."""
    queries = lengths.queries
    if workspace is not None and workspace.frozen is not None:
        workspace.check_fits(problem, page_size, queries.tokens)
        kernels, partial = workspace.frozen.kernels, workspace.frozen.partial
    else:
        kernels = load_kernels(problem, queries.longest * problem.group)
        if workspace is None:
            size = partial_bytes(kernels.useful_partial_rows, problem.head_dim)
            workspace = Workspace(torch.empty(size, dtype=torch.uint8, device=problem.device))
        partial = place_partial(workspace.partial, problem.head_dim, kernels.useful_partial_rows)

    bound = planner.plan_bytes(
        total_q=queries.tokens,
        num_requests=lengths.num_requests,
        group=kernels.group,
        kv_heads=kernels.kv_heads,
        tile_rows=kernels.tile_rows,
        num_workers=kernels.workers,
    )
    host = torch.empty(bound, dtype=torch.uint8, pin_memory=not problem.is_cpu)
    counts = planner.plan(
        q_indptr=queries.indptr.data_ptr(),
        kv_indptr=lengths.kv_indptr.data_ptr(),
        kv_len=lengths.kv_len.data_ptr(),
        num_requests=lengths.num_requests,
        group=kernels.group,
        kv_heads=kernels.kv_heads,
        tile_rows=kernels.tile_rows,
        kv_tile=kernels.kv_tile,
        causal=problem.causal,
        num_workers=kernels.workers,
        max_partial_rows=partial.rows,
        out=host.data_ptr(),
        out_bytes=bound,
    )
    fixes_now = workspace.fixed and workspace.frozen is None
    work = workspace.upload(host, counts.used_bytes, bound if fixes_now else counts.used_bytes)
    if fixes_now:
        workspace.freeze(Frozen(problem, page_size, kernels, partial), queries.tokens)
    merges = counts.num_merges
    if workspace.fixed:
        merges = kernels.workers - 1 if partial.rows > 0 else 0
    return Plan(
        problem=problem,
        page_size=page_size,
        kernels=kernels,
        workspace=workspace,
        lengths=lengths,
        checks_pages=checks_pages(),
        # What a captured graph does is decided on the device: another plan may bring tokens, and as many merges as
        # there are cuts between workers.
        is_empty=queries.tokens == 0 and not workspace.fixed,
        merge_workers=kernels.merge_workers(merges),
        attention_params=_attention_params(problem, page_size, kernels, partial, work.data_ptr()),
        merge_params=_merge_params(problem, kernels, partial, work.data_ptr()),
        buffers=(work, workspace.partial),
    )


def _attention_params(problem: Problem, page_size: Optional[int], kernels: Kernels, partial: Partial, work: int) -> Any:
    return structures()[0](
        partial_o=partial.o,
        partial_lse=partial.lse,
        items=work + planner.plan_offsets(kernels.workers).items,
        worker_indptr=work,
        kv_heads=problem.num_kv_heads,
        group=problem.group,
        head_dim=problem.head_dim,
        page_size=page_size or 1,
        causal=problem.causal,
    )


def _merge_params(problem: Problem, kernels: Kernels, partial: Partial, work: int) -> Any:
    offsets = planner.plan_offsets(kernels.workers)
    return structures()[1](
        partial_o=partial.o,
        partial_lse=partial.lse,
        merges=work + offsets.merges,
        num_merges=work + offsets.num_merges,
        tile_rows=kernels.tile_rows,
        kv_heads=kernels.kv_heads,
        group=kernels.group,
        head_dim=problem.head_dim,
    )
