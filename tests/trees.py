"""Requests that share prefixes, as tests want them: a tree of nodes with pages of their own, poisoned elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional, Tuple

import torch

import reference
from batches import HUGE, indptr_of

Level = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q_indptr, indptr, indices, last_page_len


@dataclass
class Tree:
    """A request's keys are those of all nodes from a root to its leaf. parents: -1 for a root; leaves: of requests."""

    parents: List[int]
    node_keys: List[int]
    leaves: List[int]
    q_lens: List[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float16
    device: str = "cpu"
    layout: str = "NHD"
    seed: int = 0
    q: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        pages = [-(-keys // self.page_size) for keys in self.node_keys]
        used, spare = sum(pages), 3
        order = torch.randperm(used + spare, generator=generator)
        self.indptr = indptr_of(pages)
        self.indices = torch.cat([order[:used], torch.full((5,), HUGE)]).int()
        shape = (used + spare, 2, self.page_size, self.kv_heads, self.dim)
        cache = torch.randn(shape, generator=generator).to(self.dtype)
        cache[order[used:]] = float("nan")
        self.last = [keys - (count - 1) * self.page_size if keys else 0 for keys, count in zip(self.node_keys, pages)]
        for node, last in enumerate(self.last):
            if last:
                cache[order[self.indptr[node + 1] - 1], :, last:] = float("nan")
        q = torch.randn(sum(self.q_lens), self.heads, self.dim, generator=generator)
        self.q = q.to(self.dtype).to(self.device)
        self.q_indptr = indptr_of(self.q_lens)
        self.cache = cache.to(self.device)
        if self.layout == "HND":
            self.cache = self.cache.transpose(2, 3).contiguous()
        self.k, self.v = (c.transpose(1, 2) if self.layout == "HND" else c for c in self.cache.unbind(1))

    def path(self, request: int) -> List[int]:
        """Return the nodes of a request, root first."""
        nodes: List[int] = []
        node = self.leaves[request]
        while node >= 0:
            nodes.insert(0, node)
            node = self.parents[node]
        return nodes

    def levels(self) -> List[Level]:
        """Return the levels of MultiLevelCascadeAttentionWrapper: depth by depth, and all leaves in the last one."""
        paths = [self.path(request) for request in range(len(self.leaves))]
        depth = max(map(len, paths))
        levels = [self._level([path[i] if i < len(path) - 1 else -1 for path in paths], True) for i in range(depth - 1)]
        return [*levels, self._level([path[-1] if path else -1 for path in paths], False)]

    def _level(self, nodes: List[int], merges: bool) -> Level:
        """Make a level of each request's node; neighbours that have the same one share it where `merges`."""
        runs: List[Tuple[int, int]] = []
        for node, q_len in zip(nodes, self.q_lens):
            if merges and runs and runs[-1][0] == node:
                runs[-1] = (node, runs[-1][1] + q_len)
            else:
                runs.append((node, q_len))
        tables: List[List[int]] = [
            self.indices[self.indptr[node] : self.indptr[node + 1]].tolist() if node >= 0 else [] for node, _ in runs
        ]
        flat = [page for table in tables for page in table]
        return (
            indptr_of([q_len for _, q_len in runs]),
            indptr_of([len(table) for table in tables]),
            torch.tensor(flat, dtype=torch.int32),
            torch.tensor([self.last[node] if node >= 0 else 0 for node, _ in runs], dtype=torch.int32),
        )

    def node_rows(self) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Return keys and values of each node, [keys, kv_heads, dim], on the CPU."""
        indptr = self.indptr.tolist()
        k, v = (reference.gather(part.cpu(), self.indices, indptr, self.node_keys) for part in (self.k, self.v))
        return k, v

    def expected(self, *, causal: bool = False, sm_scale: Optional[float] = None) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return (o, natural lse) in fp64: each request over its own keys, as if nothing were shared."""
        k, v = (
            [torch.cat([rows[0][:0], *(rows[node] for node in self.path(i))]) for i in range(len(self.leaves))]
            for rows in self.node_rows()
        )
        return reference.ragged(self.q.cpu(), self.q_indptr.tolist(), k, v, causal=causal, sm_scale=sm_scale)

    def check(
        self,
        o: torch.Tensor,
        lse: Optional[torch.Tensor] = None,
        *,
        causal: bool = False,
        sm_scale: Optional[float] = None,
    ) -> None:
        """Assert that o, and natural lse where given, are what fp64 gives."""
        expected_o, expected_lse = self.expected(causal=causal, sm_scale=sm_scale)
        reference.assert_close(o.cpu(), expected_o, self.dtype)
        if lse is not None:
            reference.assert_lse_close(lse.cpu(), expected_lse)
