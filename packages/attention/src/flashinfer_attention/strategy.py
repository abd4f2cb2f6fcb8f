"""Which way to attend to a prefix tree: what each way moves and computes, and the choice between them.

The estimates rank strategies, they do not promise times: rates are round numbers for a kind of device.
"""

from __future__ import annotations

import os
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from flashinfer_attention.checks import Problem
from flashinfer_attention.prefix_tree import Level, PrefixTree, cut_level, direct_levels, shared_levels
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError

STRATEGIES = ("auto", "direct", "cascade", "recursive")


class Rates(NamedTuple):
    """Bytes and operations a second, seconds of a launch, and rows to which a tile is filled up."""

    bytes: float
    flops: float
    launch: float
    tile_rows: int


RATES: Dict[str, Rates] = {"cuda": Rates(3e12, 3e14, 5e-6, 16), "cpu": Rates(2e10, 1e11, 2e-5, 1)}


class Cost(NamedTuple):
    """What one way takes: bytes of keys and values, bytes of states beside the result, estimated seconds."""

    kv_bytes: int
    state_bytes: int
    seconds: float


class Choice(NamedTuple):
    """A strategy, its levels, what it costs, and why it was taken."""

    strategy: str
    levels: List[Level]
    costs: Dict[str, Cost]
    reason: str


def cost_of(problem: Problem, levels: Sequence[Level], *, recursive: bool = False) -> Cost:
    """Estimate the cost of running the levels and, where there are several, of merging their states."""
    rates = RATES[problem.device.type]
    width = problem.head_dim + problem.head_dim_vo
    key_bytes = problem.num_kv_heads * width * problem.kv_dtype.itemsize
    seconds, kv_bytes = 0.0, 0
    for level in levels:
        moved = sum(run.keys for run in level.runs) * key_bytes
        flops = sum(_filled(run.rows * problem.group, rates.tile_rows) * run.keys for run in level.runs)
        seconds += rates.launch + max(moved / rates.bytes, 2.0 * flops * problem.num_kv_heads * width / rates.flops)
        kv_bytes += moved
    state_bytes = state_bytes_of(problem, levels, recursive=recursive)
    if len(levels) > 1:
        launches = len(levels) if recursive else 1
        written_and_read = 2 * len(levels) * state_bytes_of(problem, levels[:1], recursive=False, alone=False)
        seconds += launches * rates.launch + written_and_read / rates.bytes
    return Cost(kv_bytes, state_bytes, seconds)


def state_bytes_of(problem: Problem, levels: Sequence[Level], *, recursive: bool, alone: bool = True) -> int:
    """Count the bytes of states that are kept beside the result: those of all levels, or a sum in fp32 and one."""
    if alone and len(levels) == 1:
        return 0
    rows = levels[0].runs[-1].last * problem.num_qo_heads if levels[0].runs else 0
    state = rows * (problem.head_dim_vo * problem.dtype.itemsize + 4)
    return state + rows * 4 * (problem.head_dim_vo + 1) if recursive else state * len(levels)


def _filled(rows: int, tile_rows: int) -> int:
    return -(-rows // tile_rows) * tile_rows


def choose(
    problem: Problem,
    tree: PrefixTree,
    q_indptr: Sequence[int],
    *,
    strategy: str = "auto",
    chunk_keys: Optional[int] = None,
    needs_positions: bool = False,
    free_memory: Optional[int] = None,
) -> Choice:
    """Choose by lengths, sharing and free memory; pure where free_memory is given.

    Raises InvalidArgumentError for a strategy that does not exist or that this tree does not allow, and
    UnsupportedOptionError where positions are needed and keys must be split.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    direct = direct_levels(tree, q_indptr, problem.causal)
    if strategy == "direct" or needs_positions:
        return _direct(problem, direct, strategy, needs_positions)
    shared = shared_levels(tree, q_indptr, problem.causal)
    pieces = [piece for level in shared for piece in _cut(level, chunk_keys, tree.page_size)]
    ways: Dict[str, List[Level]] = {"cascade": shared, "recursive": pieces}
    if direct is not None:
        ways["direct"] = direct
    costs = {name: cost_of(problem, levels, recursive=name == "recursive") for name, levels in ways.items()}
    taken, reason = (strategy, "asked for") if strategy != "auto" else _best(problem, ways, costs, free_memory)
    return Choice(taken, ways[taken], costs, reason)


def _cut(level: Level, chunk_keys: Optional[int], page_size: Optional[int]) -> List[Level]:
    if chunk_keys is None:
        return [level]
    if chunk_keys < 1:
        raise InvalidArgumentError(f"chunk_keys must be at least 1, got {chunk_keys}")
    return cut_level(level, chunk_keys, page_size)


def _direct(problem: Problem, levels: Optional[List[Level]], strategy: str, needs_positions: bool) -> Choice:
    if strategy not in ("auto", "direct"):
        raise UnsupportedOptionError(
            "strategy", strategy, "auto or direct with a window, ALiBi or RoPE: a level does not know its positions"
        )
    if levels is None:
        raise InvalidArgumentError(
            "the keys of a request do not lie end to end in pages: a node before its leaf ends with a page that is "
            "part full, so it can only be read level by level",
            remedy="end shared nodes at page boundaries, or leave out window, ALiBi, RoPE and strategy='direct'",
        )
    reason = "asked for" if strategy == "direct" else "options that need positions are set"
    assert needs_positions or strategy == "direct"
    return Choice("direct", levels, {"direct": cost_of(problem, levels)}, reason)


def _best(
    problem: Problem, ways: Dict[str, List[Level]], costs: Dict[str, Cost], free_memory: Optional[int]
) -> Tuple[str, str]:
    if len(ways["recursive"]) > len(ways["cascade"]):
        return "recursive", "some node has more keys than chunk_keys, so its keys are taken in pieces"
    if "direct" not in costs:
        return _fitting(problem, costs, free_memory, "a shared node ends with a page that is part full")
    cascade, direct = costs["cascade"], costs["direct"]
    if len(ways["cascade"]) == 1:
        return "direct", "no rows of q side by side share keys"
    times = f"an estimated {cascade.seconds * 1e6:.0f} us against {direct.seconds * 1e6:.0f} us"
    if direct.seconds <= cascade.seconds:
        return "direct", f"so little is shared that levels do not pay: {times} directly"
    return _fitting(problem, costs, free_memory, f"shared keys are read once: {times} directly")


def _fitting(problem: Problem, costs: Dict[str, Cost], free_memory: Optional[int], reason: str) -> Tuple[str, str]:
    """Keep the states of all levels where there is room, else merge level by level."""
    needed, least = costs["cascade"].state_bytes, costs["recursive"].state_bytes
    if needed <= max(least, 1 << 24):
        return "cascade", reason
    free = free_bytes(problem.device) if free_memory is None else free_memory
    if needed <= free:
        return "cascade", reason
    return "recursive", f"{reason}; the states of all levels take {needed} bytes, and {free} are free"


def free_bytes(device: torch.device) -> int:
    """Ask for the memory that is free now."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, reused
    return int(free) + int(held)
