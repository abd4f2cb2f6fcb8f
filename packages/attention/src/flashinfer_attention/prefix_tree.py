"""Who shares which keys, as a tree, and the levels that attention to it takes.

A request's keys are those of all nodes from a root to its leaf. Rows of q that lie side by side and share a node read
its keys once; what a request does not share, it reads in one go. All of this is arithmetic on the host.
"""

from __future__ import annotations

from itertools import groupby
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_int32, check_readable

Integers = Union[torch.Tensor, Sequence[int]]
_HOST = torch.device("cpu")


class PrefixTree:
    """Nodes with keys of their own, and the leaf of each request.

    parent: of each of N nodes its parent, or -1 for a root; in any order. leaf: of each of B requests the node where
    its keys end, or -1 for a request without keys; several requests may have one leaf, and it may have children.
    kv_indptr: [N + 1], where each node's entries begin in the page table or, without pages, its rows in k and v.
    kv_len: [N], keys of each node; None: as many as it has rows. page_size: tokens of a page; None: no pages.
    All are int32 tensors (on a GPU they are copied back, which waits) or lists; the tree keeps copies.
    Raises InvalidArgumentError, InvalidTypeError.
    """

    def __init__(
        self,
        *,
        parent: Integers,
        leaf: Integers,
        kv_indptr: Integers,
        kv_len: Optional[Integers] = None,
        page_size: Optional[int] = None,
    ) -> None:
        self.parent, self.leaf = _listed("parent", parent), _listed("leaf", leaf)
        self.kv_indptr = _listed("kv_indptr", kv_indptr)
        self.page_size = page_size
        nodes = len(self.parent)
        if len(self.kv_indptr) != nodes + 1:
            raise InvalidArgumentError(f"kv_indptr must have {nodes + 1} elements, got {len(self.kv_indptr)}")
        entries = [end - begin for begin, end in zip(self.kv_indptr, self.kv_indptr[1:])]
        if page_size is not None and kv_len is None:
            raise InvalidArgumentError("kv_len is needed with pages: the last page of a node may be part full")
        self.kv_len = entries if kv_len is None else _listed("kv_len", kv_len)
        if len(self.kv_len) != nodes:
            raise InvalidArgumentError(f"kv_len must have {nodes} elements, got {len(self.kv_len)}")
        for node, (keys, room) in enumerate(zip(self.kv_len, entries)):
            if not 0 <= keys <= room * (page_size or 1):
                raise InvalidArgumentError(
                    f"node {node} has {keys} keys, but kv_indptr gives it room for {room * (page_size or 1)}"
                )
        for name, values in (("parent", self.parent), ("leaf", self.leaf)):
            for index, node in enumerate(values):
                if not -1 <= node < nodes:
                    raise InvalidArgumentError(f"{name}[{index}] must be from -1 to {nodes - 1}, got {node}")
        self.paths = [self._path(node) for node in self.leaf]

    def _path(self, node: int) -> Tuple[int, ...]:
        """Return the nodes from the root to `node`."""
        path: List[int] = []
        while node >= 0:
            path.append(node)
            if len(path) > len(self.parent):
                raise InvalidArgumentError(f"the parents of node {node} go round in a circle")
            node = self.parent[node]
        return tuple(reversed(path))

    def order(self) -> List[int]:
        """Return the requests in an order that brings all that share a node side by side."""
        return sorted(range(len(self.leaf)), key=lambda request: self.paths[request])

    def keys(self, request: int) -> int:
        """Count the keys of a request."""
        return sum(self.kv_len[node] for node in self.paths[request])

    def joins(self, nodes: Sequence[int]) -> bool:
        """Say whether the keys of these nodes lie end to end in one page table: all pages full, but of the last one."""
        filled = [self.kv_len[node] for node in nodes if self.kv_len[node]]
        return all(keys % (self.page_size or 1) == 0 for keys in filled[:-1])

    def entries(self, nodes: Sequence[int]) -> torch.Tensor:
        """Return the entries that hold the keys of these nodes: int64 [any], on the host."""
        spans = [torch.empty(0, dtype=torch.int64, device=_HOST)]
        for node in nodes:
            begin = self.kv_indptr[node]
            pages = -(-self.kv_len[node] // (self.page_size or 1))
            spans.append(torch.arange(begin, begin + pages, dtype=torch.int64, device=_HOST))
        return torch.cat(spans)


class Run(NamedTuple):
    """Rows `first` to `last` - 1 of q over keys `begin` to `end` - 1 of the nodes, laid end to end."""

    first: int
    last: int
    nodes: Tuple[int, ...] = ()
    begin: int = 0
    end: int = 0

    @property
    def rows(self) -> int:
        return self.last - self.first

    @property
    def keys(self) -> int:
        return self.end - self.begin


class Level(NamedTuple):
    """What one launch does: runs that cover all rows of q in order. causal: the last rows see the last keys."""

    runs: Tuple[Run, ...]
    causal: bool

    @property
    def longest(self) -> int:
        """Count the rows of the longest run."""
        return max((run.rows for run in self.runs), default=0)


def direct_levels(tree: PrefixTree, q_indptr: Sequence[int], causal: bool) -> Optional[List[Level]]:
    """Return one level with a run for each request; None where a node's last page is part full."""
    runs: List[Run] = []
    for request, path in enumerate(tree.paths):
        if not tree.joins(path):
            return None
        runs.append(Run(q_indptr[request], q_indptr[request + 1], path, 0, tree.keys(request)))
    return [Level(tuple(runs), causal)]


def shared_levels(tree: PrefixTree, q_indptr: Sequence[int], causal: bool) -> List[Level]:
    """Return the levels that read shared keys once: depth by depth, then what requests have for themselves."""
    split = _Split(tree, q_indptr, causal)
    split.divide([r for r in range(len(tree.leaf)) if q_indptr[r + 1] > q_indptr[r]], 0, 0)
    levels = [Level(_covering(runs, q_indptr[-1]), False) for runs in split.shared]
    if any(run.keys for run in split.own) or not levels:
        levels.append(Level(_covering(split.own, q_indptr[-1]), causal))
    return levels


class _Split:
    """Walk down the tree with groups of neighbouring requests."""

    def __init__(self, tree: PrefixTree, q_indptr: Sequence[int], causal: bool) -> None:
        self.tree, self.q_indptr, self.causal = tree, q_indptr, causal
        self.shared: List[List[Run]] = []
        self.own: List[Run] = []

    def divide(self, requests: Sequence[int], depth: int, level: int) -> None:
        """Place the keys from `depth` on of requests whose paths agree so far."""

        def next_node(request: int) -> Tuple[int, int]:
            path = self.tree.paths[request]
            if depth == len(path):
                return -1, 0
            # Under a causal mask each request looks at its leaf alone: rows of several would see as many keys.
            return path[depth], request if self.causal and depth == len(path) - 1 else -1

        for (node, _), group in groupby(requests, key=next_node):
            if node >= 0:
                self._place(list(group), depth, level)

    def _place(self, requests: Sequence[int], depth: int, level: int) -> None:
        nodes = self._common(requests, depth)
        run = Run(
            self.q_indptr[requests[0]],
            self.q_indptr[requests[-1] + 1],
            nodes,
            0,
            sum(self.tree.kv_len[node] for node in nodes),
        )
        depth += len(nodes)
        if all(len(self.tree.paths[request]) == depth for request in requests):
            self._check_causal(run, requests[0])
            self.own.append(run)
            return
        if run.keys:
            if level == len(self.shared):
                self.shared.append([])
            self.shared[level].append(run)
            level += 1
        self.divide(requests, depth, level)

    def _common(self, requests: Sequence[int], depth: int) -> Tuple[int, ...]:
        """Return the nodes from `depth` on that all these requests have and that join; at least one."""
        paths = [self.tree.paths[request] for request in requests]
        kept = 1 if self.causal and len(requests) > 1 else 0  # leaves, which the mask is for
        end = depth + 1
        while end < min(map(len, paths)) - kept and len({path[end] for path in paths}) == 1:
            if not self.tree.joins(paths[0][depth : end + 1]):
                break
            end += 1
        return paths[0][depth:end]

    def _check_causal(self, run: Run, request: int) -> None:
        # With one key fewer than queries the first of them sees all that is shared, and nothing of the leaf.
        if self.causal and run.keys + 1 < run.rows and run.keys < self.tree.keys(request):
            raise InvalidArgumentError(
                f"request {request} has {run.rows} queries, but its last node only {run.keys} keys: with causal=True "
                "the keys of a request's own queries must not be shared",
                remedy="put the new keys of a request in a leaf of its own",
            )


def _covering(runs: Sequence[Run], rows: int) -> Tuple[Run, ...]:
    """Fill gaps with runs that have no keys."""
    filled: List[Run] = []
    row = 0
    for run in runs:
        if run.first > row:
            filled.append(Run(row, run.first))
        filled.append(run)
        row = run.last
    if row < rows:
        filled.append(Run(row, rows))
    return tuple(filled)


def cut_level(level: Level, keys: int, page_size: Optional[int]) -> List[Level]:
    """Cut the runs of a level after every `keys` keys, at ends of pages; each piece is a level.

    Under a causal mask the last keys, as many as a run has rows, stay together: they are the last piece.
    """
    page = page_size or 1
    step = max(keys // page, 1) * page
    whole = [max(run.keys - run.rows, 0) // page * page if level.causal else run.keys for run in level.runs]
    pieces: List[Level] = []
    for begin in range(0, max(whole, default=0), step):
        runs = [
            Run(run.first, run.last, run.nodes, min(begin, seen), min(begin + step, seen))
            for run, seen in zip(level.runs, whole)
        ]
        pieces.append(Level(tuple(runs), False))
    if level.causal or not pieces:
        rest = [run._replace(begin=seen if level.causal else 0) for run, seen in zip(level.runs, whole)]
        pieces.append(Level(tuple(rest), level.causal))
    return pieces


class LevelTables(NamedTuple):
    """A level as `plan_attention` takes it: three int32 vectors; entries: int64 [any], of the page table to gather."""

    q_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_len: torch.Tensor
    entries: torch.Tensor


def level_tables(level: Level, tree: PrefixTree) -> LevelTables:
    """Lay the entries of all runs of a level end to end, on the host."""
    page = tree.page_size or 1
    entries = [torch.empty(0, dtype=torch.int64, device=_HOST)]
    kv_indptr = [0]
    for run in level.runs:
        if run.keys:
            entries.append(tree.entries(run.nodes)[run.begin // page : -(-run.end // page)])
        kv_indptr.append(kv_indptr[-1] + (len(entries[-1]) if run.keys else 0))
    return LevelTables(
        torch.tensor([0, *(run.last for run in level.runs)], dtype=torch.int32, device=_HOST),
        torch.tensor(kv_indptr, dtype=torch.int32, device=_HOST),
        torch.tensor([run.keys for run in level.runs], dtype=torch.int32, device=_HOST),
        torch.cat(entries),
    )


def _listed(name: str, values: Integers) -> List[int]:
    if not isinstance(values, torch.Tensor):
        return [int(value) for value in values]
    check_int32(name, values)
    check_readable(name, values)
    return [int(value) for value in values.tolist()]
