"""CUDA graphs: captured once, replayed with other lengths; captured even as a process' first call."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any, List

import pytest
import torch

import flashinfer
import reference
from batches import HUGE, Paged, poisoned
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError

pytestmark = pytest.mark.gpu

FIRST_CALL = """
import torch
from flashinfer import single_decode_with_kv_cache
torch.manual_seed(0)
q, k, v = (torch.randn(*shape, 128, dtype=torch.float16, device="cuda") for shape in [(32,), (5000, 8), (5000, 8)])
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    output = single_decode_with_kv_cache(q, k, v)
for seed in range(2):
    k.normal_()
    output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    heads = k.repeat_interleave(4, 1).double(), v.repeat_interleave(4, 1).double()
    weights = torch.softmax(torch.einsum("hd,khd->hk", q.double(), heads[0]) / 128**0.5, -1)
    torch.testing.assert_close(output.double(), torch.einsum("hk,khd->hd", weights, heads[1]), rtol=2e-3, atol=2e-3)
print("replayed")
"""


def test_capture_is_the_first_call_of_a_process() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "replayed"


def buffers(*sizes: int) -> List[Any]:
    return [torch.full((size,), HUGE, dtype=torch.int32, device="cuda") for size in sizes]


def capture(wrapper: Any, q: torch.Tensor, cache: torch.Tensor) -> Any:
    out, lse = poisoned(q.shape, q.dtype, "cuda"), poisoned(q.shape[:2], torch.float32, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, cache, out=out, lse=lse, return_lse=True)
    return graph, out, lse


# Pages of the captured cache: at least those of the largest batch.
PAGES = 2000


def into(cache: torch.Tensor, batch: Paged) -> None:
    cache[: len(batch.cache)] = batch.cache


DECODES = [[100, 1, 7], [20_000, 0, 1], [0, 0, 0], [1, 1, 1], [3000, 4000, 5000]]


@pytest.mark.parametrize("size", [0, 100_000, 1 << 24], ids=lambda size: f"{size}-bytes")
def test_decode_replays_with_other_lengths(size: int) -> None:
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        torch.empty(size, dtype=torch.uint8, device="cuda"), *buffers(4, PAGES, 3)
    )
    graph: Any = None
    q = cache = out = lse = torch.empty(0)
    for seed, kv_lens in enumerate(DECODES):
        batch = Paged([1, 1, 1], kv_lens, heads=8, dim=128, seed=seed, device="cuda")
        wrapper.plan(batch.indptr, batch.indices, batch.last_page_len, 8, 2, 128, 16, q_data_type=batch.dtype)
        if graph is None:
            q, cache = batch.q.clone(), poisoned((PAGES, *batch.cache.shape[1:]), batch.dtype, "cuda")
            graph, out, lse = capture(wrapper, q, cache)
        q.copy_(batch.q)
        into(cache, batch)
        out.fill_(float("nan"))
        graph.replay()
        batch.check(out, lse)


def test_prefill_replays_with_other_lengths() -> None:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(1 << 24, dtype=torch.uint8, device="cuda"), "NHD", True, *buffers(3, 3, PAGES, 2)
    )
    graph: Any = None
    q = cache = out = lse = torch.empty(0)
    for seed, (q_lens, kv_lens) in enumerate([([150, 150], [150, 3000]), ([1, 299], [9000, 299]), ([0, 3], [0, 3])]):
        batch = Paged(q_lens, kv_lens, heads=8, dim=128, seed=seed, device="cuda")
        tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
        wrapper.plan(*tables, 8, 2, 128, 16, causal=True, q_data_type=batch.dtype)
        rows = len(batch.q)
        if graph is None:
            q, cache = batch.q.clone(), poisoned((PAGES, *batch.cache.shape[1:]), batch.dtype, "cuda")
            graph, out, lse = capture(wrapper, q, cache)
        q[:rows] = batch.q
        into(cache, batch)
        out.fill_(float("nan"))
        graph.replay()
        batch.check(out[:rows], lse[:rows], causal=True)


def test_a_batch_that_outgrows_what_was_captured() -> None:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda"), "NHD", True, *buffers(3, 3, 100, 2)
    )

    def plan(q_lens: List[int]) -> Paged:
        batch = Paged(q_lens, [50, 60], device="cuda")
        tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
        wrapper.plan(*tables, batch.heads, batch.kv_heads, batch.dim, batch.page_size)
        return batch

    plan([50, 40])
    batch = plan([30, 40])
    capture(wrapper, batch.q, batch.cache)
    with pytest.raises(WorkspaceError, match=r"71 query tokens.*captured with 70"):
        plan([31, 40])


def test_planning_in_a_capture_is_refused() -> None:
    batch = Paged([5, 4], [50, 60], device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8, device="cuda"))
    tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
    shape = (batch.heads, batch.kv_heads, batch.dim, batch.page_size)
    wrapper.plan(*tables, *shape, causal=True)
    expected: Any = wrapper.run(batch.q, batch.cache)
    lengths_there = tables[0].cuda()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        batch.q.mul_(1)  # torch warns of empty graphs
        with pytest.raises(InvalidArgumentError, match="planning cannot be captured"):
            wrapper.plan(*tables, *shape)
        with pytest.raises(InvalidArgumentError, match="planning cannot be captured"):
            wrapper.plan(lengths_there, *tables[1:], *shape)
        with pytest.raises(InvalidArgumentError, match="planning cannot be captured"):
            wrapper.forward(batch.q, batch.cache, causal=False)
    again: Any = wrapper.run(batch.q, batch.cache)
    assert torch.equal(again, expected)


def test_a_graph_of_a_plain_wrapper_keeps_its_plan() -> None:
    batch, other = (Paged([5, 4], kv_lens, device="cuda", seed=1) for kv_lens in ([500, 60], [70, 9]))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8, device="cuda"))

    def plan(what: Paged) -> None:
        tables = (what.q_indptr, what.indptr, what.indices, what.last_page_len)
        wrapper.plan(*tables, what.heads, what.kv_heads, what.dim, what.page_size)

    plan(batch)
    graph, out, lse = capture(wrapper, batch.q, batch.cache)
    plan(other)
    other.check(*wrapper.run(other.q, other.cache, return_lse=True))
    graph.replay()
    batch.check(out, lse)


class Pool:
    """A paged cache from which batches of any lengths take pages."""

    def __init__(self, requests: int) -> None:
        torch.manual_seed(5)
        self.requests = requests
        self.cache = torch.randn(PAGES, 2, 16, 2, 128, device="cuda").half()

    def draw(self, generator: random.Random, most_queries: int) -> Any:
        """Return q_indptr, indptr, indices and last_page_len; some requests have become empty."""
        q_lens = [generator.choice([1, generator.randint(0, most_queries)]) for _ in range(self.requests)]
        longest = generator.choice([5, 300, 6000])
        kv_lens = [generator.choice([0, 1, longest, generator.randint(0, longest)]) for _ in range(self.requests)]
        pages = [-(-length // 16) for length in kv_lens]
        last = [length - 16 * (page - 1) if page else 0 for length, page in zip(kv_lens, pages)]
        indices = torch.tensor(generator.choices(range(PAGES), k=sum(pages)), dtype=torch.int32)
        q_indptr, indptr = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (q_lens, pages))
        return q_indptr, indptr, indices, torch.tensor(last, dtype=torch.int32)


def check_replay(graph: Any, outputs: Any, eager: Any, rows: int) -> None:
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    (out, lse), (o, eager_lse) = (tuple(x[:rows].cpu() for x in pair) for pair in (outputs, eager))
    reference.assert_close(out, o.double(), torch.float16)
    reference.assert_lse_close(lse.double(), eager_lse.double())


def test_decode_replays_any_of_200_batches_as_eager_runs_it() -> None:
    requests = 9
    pool, generator = Pool(requests), random.Random(11)
    entries = requests * 6000 // 16 + requests
    fixed: Any = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 22, dtype=torch.uint8, device="cuda"), *buffers(requests + 1, entries, requests)
    )
    plain: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 22, dtype=torch.uint8, device="cuda"))
    q = torch.randn(requests, 8, 128, device="cuda").half()
    graph: Any = None
    outputs: Any = None
    for _ in range(200):
        tables = pool.draw(generator, 1)[1:]
        for wrapper in (fixed, plain):
            wrapper.plan(*tables, 8, 2, 128, 16, q_data_type=torch.float16)
        if graph is None:
            graph, *outputs = capture(fixed, q, pool.cache)
        q.normal_()
        check_replay(graph, outputs, plain.run(q, pool.cache, return_lse=True), requests)


def test_prefill_replays_any_of_200_batches_as_eager_runs_it() -> None:
    requests, most = 5, 70
    pool, generator = Pool(requests), random.Random(12)
    entries = requests * 6000 // 16 + requests
    fixed: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(1 << 22, dtype=torch.uint8, device="cuda"),
        "NHD",
        True,
        *buffers(requests + 1, requests + 1, entries, requests),
    )
    plain: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1 << 22, dtype=torch.uint8, device="cuda"))
    q = torch.randn(requests * most, 8, 128, device="cuda").half()
    full = torch.arange(requests + 1, dtype=torch.int32)
    fixed.plan(
        full * most, full, torch.zeros(requests, dtype=torch.int32), full[1:] * 0 + 1, 8, 2, 128, 16, causal=True
    )
    graph, *outputs = capture(fixed, q, pool.cache)
    for _ in range(200):
        tables = pool.draw(generator, most)
        for wrapper in (fixed, plain):
            wrapper.plan(*tables, 8, 2, 128, 16, causal=True)
        rows = int(tables[0][-1])
        q.normal_()
        check_replay(graph, outputs, plain.run(q[:rows], pool.cache, return_lse=True), rows)
