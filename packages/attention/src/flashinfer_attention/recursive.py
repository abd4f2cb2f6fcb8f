"""Attention to a prefix tree: level by level, in pieces, or directly, whichever is best; one plan, run often.

Levels and pieces are states that merge (states.py), so any split gives the same result. What is merged at the end, and
what as it comes, is the plan's strategy; `explain` says which was chosen and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from flashinfer_attention.attention import attention
from flashinfer_attention.checks import Problem, make_problem
from flashinfer_attention.explain import explained
from flashinfer_attention.plan import Plan, plan_attention
from flashinfer_attention.prefix_tree import Level, PrefixTree, level_tables
from flashinfer_attention.states import RunningState, check_head_dim, merge_states
from flashinfer_attention.strategy import Choice, choose
from flashinfer_attention.workspace import Workspace, workspace_bytes
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError
from flashinfer_core.tensors import check_int32, check_readable, check_tensor


class PlannedLevel(NamedTuple):
    """A level, its plan, and its own page table."""

    level: Level
    plan: Plan
    page_table: torch.Tensor


@dataclass(frozen=True, eq=False)
class CascadePlan:
    """What `cascade_attention` runs; see plan_cascade. A GPU runs it on one stream at a time."""

    problem: Problem
    tree: PrefixTree
    choice: Choice
    needs_positions: bool
    levels: Tuple[PlannedLevel, ...]
    workspace_bytes: int

    @property
    def strategy(self) -> str:
        """Name what was chosen: direct, cascade or recursive."""
        return self.choice.strategy

    @property
    def tokens(self) -> int:
        """Count the rows of q."""
        return self.levels[0].plan.tokens

    def explain(self) -> str:
        """Say in words what was chosen and why, and each launch's tile, splits and workers; waits for a GPU."""
        return "\n".join(explained(self))


def plan_cascade(
    *,
    tree: PrefixTree,
    q_indptr: torch.Tensor,
    page_table: Optional[torch.Tensor] = None,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: Optional[int] = None,
    causal: bool = False,
    window_left: int = -1,
    needs_positions: bool = False,
    dtype: torch.dtype,
    kv_dtype: Optional[torch.dtype] = None,
    device: Union[torch.device, str],
    strategy: str = "auto",
    chunk_keys: Optional[int] = None,
    free_memory: Optional[int] = None,
    workspace: Optional[torch.Tensor] = None,
) -> CascadePlan:
    """Plan attention of requests whose keys are paths in `tree`.

    q_indptr: int32 [B + 1], rows of q of each request, in the order of tree.leaf; requests that share a node should be
    neighbours (tree.order()), for only these read it together. page_table: int32 [entries], page numbers of all nodes,
    read now; None where the tree has no pages. causal: query i of a request sees keys up to i + kv_len - q_len of its
    path, whose last q_len keys must lie in the leaf. window_left, dtypes, heads: as plan_attention.
    needs_positions: calls will use ALiBi or RoPE.
    strategy: direct: one launch, every request reads its whole path. cascade: a launch for each level, shared nodes
    read once, states merged at the end. recursive: levels, in pieces of at most chunk_keys keys where given, each
    merged into a running state in fp32. auto: the best of them by lengths, sharing and free_memory, in bytes (None:
    ask the device).
    workspace: uint8 [any] on the device, for split results; None: allocated.
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
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
    )
    rows = _rows(q_indptr, tree)
    needs_positions = needs_positions or problem.window_left >= 0
    choice = choose(
        problem,
        tree,
        rows,
        strategy=strategy,
        chunk_keys=chunk_keys,
        needs_positions=needs_positions,
        free_memory=free_memory,
    )
    if len(choice.levels) > 1:
        check_head_dim(problem.head_dim_vo)
    table = _checked_table(page_table, tree)
    buffers = split_workspace(_workspace(problem, choice.levels, workspace), len(choice.levels))
    levels = [_plan_level(problem, level, tree, table, buffer) for level, buffer in zip(choice.levels, buffers)]
    size = buffers[0].numel() * (len(buffers) if problem.is_cpu else 1)
    return CascadePlan(problem, tree, choice, needs_positions, tuple(levels), size)


def cascade_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: CascadePlan,
    sinks: Optional[torch.Tensor] = None,
    alibi: bool = False,
    rope: bool = False,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
    **options: Any,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of every request of `plan` over the keys on its path.

    q: [tokens, num_qo_heads, head_dim]. k, v: [pages, page_size, num_kv_heads, head_dim], or where the tree has no
    pages [rows, num_kv_heads, head_dim]. out, lse: as `attention`. options: its scales, soft cap and rope parameters;
    sinks count once for each row. alibi and rope need a plan with needs_positions.
    Return (o, lse in natural logarithm); a row that sees no key has o = 0, lse = -inf. Asynchronous on GPUs.
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    if (alibi or rope) and not plan.needs_positions:
        raise UnsupportedOptionError("alibi" if alibi else "rope", True, "plans with needs_positions=True")
    if plan.tree.page_size is None:
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    first = {**options, "sinks": sinks, "alibi": alibi, "rope": rope}
    if len(plan.levels) == 1:
        return _run_level(plan.levels[0], q, k, v, first, out, lse)
    check_tensor("q", q, (plan.tokens, plan.problem.num_qo_heads, plan.problem.head_dim))
    if plan.strategy == "recursive":
        return _merge_as_they_come(plan, (q, k, v), (first, options), out, lse)
    shape = (len(plan.levels), plan.tokens, plan.problem.num_qo_heads)
    states = torch.empty((*shape, plan.problem.head_dim_vo), dtype=q.dtype, device=q.device)
    sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    for i, level in enumerate(plan.levels):
        _run_level(level, q, k, v, options if i else first, states[i], sums[i])
    return merge_states(states.transpose(0, 1), sums.transpose(0, 1), out=out, lse_out=lse)


def _merge_as_they_come(
    plan: CascadePlan,
    tensors: Tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: Tuple[Any, Any],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    q, k, v = tensors
    heads, width = plan.problem.num_qo_heads, plan.problem.head_dim_vo
    total = RunningState(plan.tokens, heads, width, q.device)
    o = torch.empty((plan.tokens, heads, width), dtype=q.dtype, device=q.device) if out is None else out
    part = torch.empty((plan.tokens, heads), dtype=torch.float32, device=q.device) if lse is None else lse
    for i, level in enumerate(plan.levels):
        total.add(*_run_level(level, q, k, v, options[min(i, 1)], o, part))
    return o.copy_(total.o), part.copy_(total.lse)


def _run_level(
    level: PlannedLevel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Any,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    return attention(q, k, v, plan=level.plan, page_table=level.page_table, out=out, lse=lse, **options)


def _rows(q_indptr: torch.Tensor, tree: PrefixTree) -> List[int]:
    check_int32("q_indptr", q_indptr, len(tree.leaf) + 1)
    check_readable("q_indptr", q_indptr)
    rows = [int(row) for row in q_indptr.tolist()]
    if rows[0] != 0 or any(end < begin for begin, end in zip(rows, rows[1:])):
        raise InvalidArgumentError(f"q_indptr must begin with 0 and not decrease, got {rows}")
    return rows


def _checked_table(page_table: Optional[torch.Tensor], tree: PrefixTree) -> Optional[torch.Tensor]:
    if (page_table is None) != (tree.page_size is None):
        raise InvalidArgumentError("page_table must be given if and only if the tree has a page_size")
    if page_table is not None:
        check_int32("page_table", page_table)
        needed = max(tree.kv_indptr)
        if page_table.shape[0] < needed:
            raise InvalidArgumentError(f"page_table must have at least {needed} entries, got {page_table.shape[0]}")
    return page_table


def _workspace(problem: Problem, levels: Sequence[Level], workspace: Optional[torch.Tensor]) -> torch.Tensor:
    """Return the buffer for split results, as large as the launch with the longest run can use."""
    if workspace is not None:
        return workspace
    size = workspace_bytes(
        num_qo_heads=problem.num_qo_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        max_q_len=max(1, *(level.longest for level in levels)),
        device=problem.device,
    )
    return torch.empty(size * (len(levels) if problem.is_cpu else 1), dtype=torch.uint8, device=problem.device)


def split_workspace(buffer: Any, count: int) -> Sequence[torch.Tensor]:
    """Give `count` plans that run one after another room for split results.

    On a GPU each uses all of it; on a CPU threads may run several at once, so each has a part.
    """
    if not isinstance(buffer, torch.Tensor) or buffer.device.type != "cpu" or buffer.dim() != 1:
        return [buffer] * count
    size = buffer.numel() // count
    return [buffer[i * size : (i + 1) * size] for i in range(count)]


def _plan_level(
    problem: Problem, level: Level, tree: PrefixTree, page_table: Optional[torch.Tensor], buffer: torch.Tensor
) -> PlannedLevel:
    tables = level_tables(level, tree)
    plan = plan_attention(
        q_indptr=tables.q_indptr,
        kv_indptr=tables.kv_indptr,
        kv_len=tables.kv_len,
        num_qo_heads=problem.num_qo_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        head_dim_vo=problem.head_dim_vo,
        page_size=tree.page_size or 1,
        causal=level.causal,
        window_left=problem.window_left,
        dtype=problem.dtype,
        kv_dtype=problem.kv_dtype,
        device=problem.device,
        workspace=Workspace(buffer),
    )
    entries = tables.entries
    if not problem.is_cpu:
        entries = entries.pin_memory().to(problem.device, non_blocking=True)
    if page_table is None:
        return PlannedLevel(level, plan, entries.int())
    return PlannedLevel(level, plan, page_table.to(problem.device, non_blocking=True)[entries])
