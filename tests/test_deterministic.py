"""deterministic=True: the bits of a request's result depend on nothing but the request."""

from __future__ import annotations

import random
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
import torch

import flashinfer_attention
from batches import Paged, plan_of
from flashinfer_attention import Workspace, attention, workspace_bytes
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError

State = Tuple[torch.Tensor, torch.Tensor]

# (q_len, kv_len): pieces and none, ends inside a page, more queries than keys, nothing to see.
MIXED = [(1, 9000), (1, 1024), (1, 1025), (70, 4000), (3, 2), (1, 0), (0, 50), (40, 40), (1, 30_000), (5, 7777)]
DECODES = [(1, kv_len) for kv_len in (9000, 1, 1024, 1025, 0, 40_000, 2047, 16)]


class Requests:
    """Requests that keep their queries, keys and values in whatever batch they are."""

    def __init__(self, lengths: Sequence[Tuple[int, int]], device: str) -> None:
        self.lengths = lengths
        self.all = Paged([q for q, _ in lengths], [kv for _, kv in lengths], seed=3, device=device)

    def run(self, order: Sequence[int], max_q_len: Optional[int], **options: Any) -> Dict[int, State]:
        """Return o and lse of each request in `order`, as one batch."""
        whole = self.all
        q_starts, page_starts = whole.q_indptr.tolist(), whole.indptr.tolist()
        rows = [row for i in order for row in range(q_starts[i], q_starts[i + 1])]
        pages = [page for i in order for page in range(page_starts[i], page_starts[i + 1])]
        batch = Paged([self.lengths[i][0] for i in order], [self.lengths[i][1] for i in order], device=whole.device)
        table = whole.indices[torch.tensor(pages, dtype=torch.long, device=whole.indices.device)].to(whole.device)
        plan = plan_of(batch, deterministic=True, max_q_len=max_q_len, **options)
        q = whole.q[torch.tensor(rows, dtype=torch.long, device=whole.q.device)]
        o, lse = attention(q, whole.k, whole.v, plan=plan, page_table=table)
        starts = batch.q_indptr.tolist()
        return {i: (o[a:b].clone(), lse[a:b].clone()) for i, a, b in zip(order, starts, starts[1:])}


def check_same(found: Dict[int, State], expected: Dict[int, State]) -> None:
    for i, (o, lse) in found.items():
        assert torch.equal(o, expected[i][0]), i
        assert torch.equal(lse, expected[i][1]), i


@pytest.mark.parametrize(
    ("lengths", "max_q_len"),
    [pytest.param(MIXED, None, id="mixed"), pytest.param(DECODES, 1, id="decode")],
)
def test_bits_do_not_depend_on_the_batch(lengths: List[Tuple[int, int]], max_q_len: Optional[int], device: str) -> None:
    requests = Requests(lengths, device)
    alone: Dict[int, State] = {}
    for i in range(len(lengths)):
        alone.update(requests.run([i], max_q_len, causal=True))
    everyone = list(range(len(lengths)))
    check_same(requests.run(everyone, max_q_len, causal=True), alone)
    for seed in range(6):
        order = random.Random(seed).sample(everyone, 2 + seed % (len(everyone) - 2))
        check_same(requests.run(order, max_q_len, causal=True), alone)
        check_same(requests.run([*order, *order[:1]][::-1], max_q_len, causal=True), alone)


def test_results_are_right_and_split(device: str) -> None:
    batch = Paged([q for q, _ in MIXED], [kv for _, kv in MIXED], device=device)
    plan = plan_of(batch, deterministic=True, causal=True)
    assert plan.merge_workers
    o, lse = attention(batch.q, batch.k, batch.v, plan=plan, page_table=batch.indices.to(device))
    batch.check(o, lse, causal=True, base2=False)


def test_a_fixed_workspace_gives_the_same_bits(device: str) -> None:
    """As a CUDA graph has it: buffers, kernels and grid are those of the first plan."""
    requests = Requests(MIXED, device)
    everyone = list(range(len(MIXED)))
    expected = requests.run(everyone, None)
    maxima: Dict[str, Any] = {"max_q_len": 100, "max_requests": len(MIXED), "max_kv_len": 30_000}
    size = workspace_bytes(num_qo_heads=4, num_kv_heads=2, head_dim=64, device=device, deterministic=True, **maxima)
    fixed = Workspace(torch.empty(size, dtype=torch.uint8, device=device), fixed=True)
    check_same(requests.run(everyone, None, workspace=fixed), expected)
    check_same(requests.run(everyone[::-1], None, workspace=fixed), expected)


@pytest.mark.parametrize("max_q_len", [1, 33, 2000])
def test_no_batch_outgrows_what_its_maxima_ask_for(max_q_len: int, device: str) -> None:
    most, longest = 12, 20_000
    maxima: Dict[str, Any] = {"max_q_len": max_q_len, "max_requests": most, "max_kv_len": longest}
    size = workspace_bytes(num_qo_heads=4, num_kv_heads=2, head_dim=64, device=device, deterministic=True, **maxima)
    workspace = Workspace(torch.empty(size, dtype=torch.uint8, device=device))
    for seed in range(20):
        draw = random.Random(seed)
        q_lens = [draw.choice([1, max_q_len, draw.randint(1, max_q_len)]) for _ in range(most)]
        kv_lens = [draw.choice([longest, draw.randint(0, longest)]) for _ in range(most)]
        plan = plan_of_lengths(q_lens, kv_lens, device, workspace, max_q_len)
        assert plan.tokens == sum(q_lens)


def plan_of_lengths(
    q_lens: List[int], kv_lens: List[int], device: str, workspace: Workspace, max_q_len: Optional[int]
) -> Any:
    q_indptr, kv_indptr = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (q_lens, kv_lens))
    return flashinfer_attention.plan_attention(
        q_indptr=q_indptr,
        kv_indptr=kv_indptr,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=64,
        dtype=torch.float16,
        device=device,
        workspace=workspace,
        deterministic=True,
        max_q_len=max_q_len,
    )


def test_too_small_a_workspace_is_refused(device: str) -> None:
    """Fewer pieces would be other bits, so nothing adapts."""
    workspace = Workspace(torch.empty(10_000, dtype=torch.uint8, device=device))
    with pytest.raises(WorkspaceError, match=r"(?s)need \d+ partial rows.*workspace_bytes\(deterministic=True\)"):
        plan_of_lengths([1], [20_000], device, workspace, 1)
    assert plan_of_lengths([1], [1000], device, workspace, 1).tokens == 1


def test_max_q_len_is_kept(device: str) -> None:
    workspace = Workspace(torch.empty(10_000, dtype=torch.uint8, device=device))
    with pytest.raises(InvalidArgumentError, match="a request has 3 queries, but max_q_len is 2"):
        plan_of_lengths([1, 3], [5, 5], device, workspace, 2)
