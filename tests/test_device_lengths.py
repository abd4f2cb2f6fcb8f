"""Lengths on a GPU are planned there: nothing waits, and the plan is the one that the host makes, to the bit."""

from __future__ import annotations

import ctypes
from typing import Any, List, Optional

import pytest
import torch

import flashinfer
from batches import Paged, plan_of
from flashinfer_attention import Workspace, attention, device_plan
from flashinfer_attention.checks import make_problem
from flashinfer_attention.lengths import Lengths, Source
from flashinfer_attention.plan import plan_lengths
from flashinfer_core import planner

BATCHES = [
    pytest.param([1] * 5, [9000, 1, 0, 640, 33], 1, id="decode"),
    pytest.param([70, 1, 0, 3], [4000, 5000, 9, 2], 70, id="mixed"),
    pytest.param([1] * 1024, [17 * i % 900 for i in range(1024)], 1, id="1024-decodes"),
]


def plan_at(batch: Paged, *tables: torch.Tensor, **options: Any) -> Any:
    lengths = dict(zip(("q_indptr", "kv_indptr", "kv_len"), tables))
    return plan_of(batch, **lengths, causal=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["shares", "deterministic"])
@pytest.mark.parametrize(("q_lens", "kv_lens", "max_q_len"), BATCHES)
def test_the_plan_is_that_of_the_host(
    q_lens: List[int], kv_lens: List[int], max_q_len: int, deterministic: bool
) -> None:
    batch = Paged(q_lens, kv_lens, device="cuda")
    tables = (batch.q_indptr, batch.indptr, batch.kv_len)
    # The bound of a deterministic plan does not know the lengths.
    size = (1 << 31) if deterministic else (1 << 22)
    options = {"deterministic": deterministic, "max_q_len": max_q_len, "max_tokens": sum(q_lens)}
    results = []
    for where in ("cpu", "cuda"):
        workspace = Workspace(torch.empty(size, dtype=torch.uint8, device="cuda"))
        plan = plan_at(batch, *(table.to(where) for table in tables), workspace=workspace, **options)
        assert (plan.lengths.source is not None) == (where == "cuda")
        o, lse = attention(batch.q, batch.k, batch.v, plan=plan, page_table=batch.indices.cuda())
        batch.check(o, lse, causal=True, base2=False)
        results.append((plan, o, lse))
    (host, o, lse), (device, device_o, device_lse) = results
    assert torch.equal(o, device_o)
    assert torch.equal(lse, device_lse)
    offsets = planner.plan_offsets(host.kernels.workers, host.kernels.workers)
    if not deterministic:
        items = int(host.work[: offsets.num_merges].view(torch.int32)[-1])
        for begin, end in ((0, offsets.num_merges + 4), (offsets.items, offsets.items + 48 * items)):
            assert torch.equal(host.work[begin:end], device.work[begin:end])


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_planning_waits_for_nothing(where: str) -> None:
    """The stream is blocked for seconds; plan and run come back at once, and the result is right in the end."""
    batch = Paged([1] * 5, [9000, 1, 0, 640, 33], device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 22, dtype=torch.uint8, device="cuda"))
    indptr, last = batch.indptr.to(where), batch.last_page_len.to(where)
    shape = (batch.heads, batch.kv_heads, batch.dim, batch.page_size)
    indices = batch.indices.cuda()
    wrapper.plan(indptr, indices, last, *shape)  # loads the kernels, which may wait
    wrapper.run(batch.q, batch.cache)
    torch.cuda.synchronize()
    cuda: Any = torch.cuda  # some releases of torch leave these untyped
    blocked = cuda.Event()
    cuda._sleep(4_000_000_000)
    blocked.record()
    for _ in range(5):
        wrapper.plan(indptr, indices, last, *shape)
        result = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert not blocked.query()
    batch.check(*result)


@pytest.mark.gpu
def test_a_batch_beyond_its_maxima_writes_nothing() -> None:
    batch = Paged([1, 3], [50, 60], device="cuda")
    tables = [table.cuda() for table in (batch.q_indptr, batch.indptr, batch.kv_len)]
    plan = plan_at(batch, *tables, max_q_len=2, max_tokens=4)
    out = torch.full_like(batch.q, 7)
    attention(batch.q, batch.k, batch.v, plan=plan, page_table=batch.indices.cuda(), out=out)
    assert (out == 7).all()


class HostKernel:
    """Makes the plan on the host, from the parameters of the kernel."""

    def launch(self, params: Any, *, workers: int, stream: int) -> None:
        assert (workers, stream) == (1, 0)
        requests = params.num_requests
        planner.read_lengths(
            q_indptr=params.q_indptr or 0,
            kv_indptr=params.kv_indptr,
            keys=params.keys or 0,
            num_requests=requests,
            page_size=params.page_size,
            last_pages=bool(params.last_pages),
            out=params.lengths,
        )
        fields = planner.Shape._fields
        shape = planner.Shape(*(getattr(params, name) for name in fields))
        offsets = planner.plan_offsets(shape.num_workers, params.max_merges)
        assert params.items - params.worker_indptr == offsets.items
        assert params.merges - params.worker_indptr == offsets.merges
        assert params.arrivals - params.worker_indptr == offsets.arrivals
        assert params.num_merges - params.worker_indptr == offsets.num_merges
        planner.plan(
            shape._replace(causal=bool(shape.causal)),
            q_indptr=params.lengths,
            kv_indptr=params.lengths + 4 * (requests + 1),
            kv_len=params.lengths + 8 * (requests + 1),
            num_requests=requests,
            max_partial_rows=params.max_pieces * shape.tile_rows,
            max_merges=params.max_merges,
            out=params.worker_indptr,
            out_bytes=offsets.items + 48 * params.max_items,
        )


@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "fixed"])
@pytest.mark.parametrize(("q_lens", "kv_lens", "max_q_len"), BATCHES)
def test_what_the_kernel_is_told(
    q_lens: List[int], kv_lens: List[int], max_q_len: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU stands for the GPU, and the host's planner for the kernel: the rest of the way is the same."""
    monkeypatch.setattr(device_plan, "load", lambda *_: HostKernel())
    batch = Paged(q_lens, kv_lens)
    q_indptr: Optional[torch.Tensor] = None if max_q_len == 1 else batch.q_indptr
    source = Source(q_indptr, batch.indptr, batch.last_page_len, batch.page_size, last_pages=True)
    facts = planner.Facts(len(batch.q), max_q_len, 0)
    lengths = Lengths(batch.indptr[:0], len(q_lens), facts, max_q_len, source=source)
    problem = make_problem(batch.heads, batch.kv_heads, batch.dim, True, batch.dtype, torch.device("cpu"))
    monkeypatch.setattr("flashinfer_attention.plan.is_checked", lambda _: False)
    workspace = Workspace(torch.empty(1 << 20, dtype=torch.uint8), fixed=fixed)
    for _ in range(2):  # the second time from the lengths that the first plan kept
        plan = plan_lengths(problem, batch.page_size, lengths, workspace)
        o, lse = attention(batch.q, batch.k, batch.v, plan=plan, page_table=batch.indices)
        batch.check(o, lse, causal=True, base2=False)
        lengths = plan.lengths
    assert plan.lengths.kv_len.tolist() == kv_lens
    assert ctypes.sizeof(device_plan._params(planner.Shape(1, 1, 1, 1, False, 1))) == 160
