"""What a plan of attention to a prefix tree does, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Sequence

import torch

if TYPE_CHECKING:
    from flashinfer_attention.plan import Plan
    from flashinfer_attention.recursive import CascadePlan, PlannedLevel


def explained(plan: CascadePlan) -> List[str]:
    """Return the lines of CascadePlan.explain."""
    problem, costs = plan.problem, plan.choice.costs
    lines = [f"{plan.strategy}: {plan.choice.reason}"]
    for name, cost in costs.items():
        lines.append(
            f"  {name} would read {_size(cost.kv_bytes)} of keys and values, keep {_size(cost.state_bytes)} of states, "
            f"and take about {cost.seconds * 1e6:.0f} us"
        )
    lines.append(
        f"{len(plan.tree.leaf)} requests with {plan.tokens} rows of q, {len(plan.tree.parent)} nodes, "
        f"{problem.num_qo_heads}/{problem.num_kv_heads} heads x {problem.head_dim}, {problem.dtype} on {problem.device}"
    )
    for i, level in enumerate(plan.levels):
        lines.append(f"launch {i + 1} of {len(plan.levels)}: {_launch(level)}")
    if len(plan.levels) > 1:
        how = "each merged into a running state" if plan.strategy == "recursive" else "merged by one launch"
        lines.append(f"{len(plan.levels)} states of each row, {how}")
    lines.append(f"workspace: {_size(plan.workspace_bytes)} for split results")
    again = 0 if plan.strategy == "direct" else _read_again(plan.levels)
    if again:
        lines.append(f"{again} nodes are read more than once by a launch: bring requests into the order tree.order()")
    return lines


def _launch(level: PlannedLevel) -> str:
    kernels = level.plan.kernels
    runs = [run for run in level.level.runs if run.keys]
    items, cut = _word(level.plan, 4 * kernels.workers), _word(level.plan, _merges_at(level.plan))
    rows = sorted({run.rows for run in runs}) or [0]
    keys = sorted({run.keys for run in runs}) or [0]
    return (
        f"{len(runs)} runs of {_range(rows)} rows over {_range(keys)} keys{', causal' if level.level.causal else ''}; "
        f"tiles of {kernels.tile_rows} rows x {kernels.kv_tile} keys ({kernels.attention.variant.name}), "
        f"{items} pieces of work for {kernels.workers} workers, {cut} tiles split"
    )


def _merges_at(plan: Plan) -> int:
    """Return the offset of the number of merges in the work list, which begins with where each worker's items end."""
    return int(plan.merge_params.num_merges - plan.attention_params.worker_indptr)


def _word(plan: Plan, offset: int) -> int:
    return int(plan.work[offset : offset + 4].cpu().view(torch.int32))


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _read_again(levels: Sequence[PlannedLevel]) -> int:
    """Count the nodes that several runs of one launch read whole, where a better order would join the runs."""
    again = 0
    for level in levels:
        if level.level.causal:
            continue
        seen = [run.nodes for run in level.level.runs if run.keys]
        again += len({nodes for nodes in seen if seen.count(nodes) > 1})
    return again
