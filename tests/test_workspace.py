"""What plans share: buffers that fit, failures that leave the last plan as it was, captures, and who came last."""

from __future__ import annotations

import threading
from typing import Any, Dict, List

import pytest
import torch

import flashinfer
import flashinfer_attention.lengths
from batches import Paged, plan_of
from flashinfer_attention import Workspace, attention, workspace_bytes
from flashinfer_attention.checks import refuse_capture
from flashinfer_attention.staging import Slot, Staging
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, WorkspaceError


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def workspace(size: int = 1 << 20) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


class Event:
    """Stands for a CUDA event: `done` says whether the copy before it has run."""

    def __init__(self) -> None:
        self.done = True

    def query(self) -> bool:
        return self.done

    def record(self, _stream: Any = None) -> None:
        self.done = False


def slot(size: int) -> Slot:
    return Slot(workspace(size), Event())


@pytest.mark.parametrize("bad", ["missing", "int64", "meta", "sizes"])
def test_graph_buffers(bad: str) -> None:
    buffers: List[Any] = [ints(0, 0, 0), ints(0, 0), ints(0, 0)]
    if bad == "missing":
        with pytest.raises(InvalidArgumentError, match="needs paged_kv_indptr_buffer"):
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True)
        return
    buffers[0] = {"int64": buffers[0].long(), "meta": buffers[0].to("meta"), "sizes": ints(0, 0)}[bad]
    error = InvalidTypeError if bad == "int64" else InvalidArgumentError
    with pytest.raises(error, match="paged_kv_indptr_buffer"):
        flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)


def test_graph_batches_that_do_not_fit() -> None:
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), ints(0, 0, 0), ints(0, 0), ints(0, 0))
    with pytest.raises(InvalidArgumentError, match="batches of 2 requests, got 1"):
        wrapper.plan(ints(0, 1), ints(0), ints(5), 4, 2, 64, 16)
    with pytest.raises(WorkspaceError, match=r"3 pages.*room for 2"):
        wrapper.plan(ints(0, 1, 3), ints(0, 1, 2), ints(5, 5), 4, 2, 64, 16)


def test_workspaces() -> None:
    with pytest.raises(InvalidTypeError, match="float_workspace_buffer"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper([])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="float_workspace_buffer must be a contiguous vector"):
        Workspace(workspace(64).view(8, 8))
    with pytest.raises(InvalidArgumentError, match="int_workspace_buffer must be on cpu"):
        Workspace(workspace(), workspace().to("meta"))
    with pytest.raises(InvalidArgumentError, match="num_qo_heads"):
        workspace_bytes(num_qo_heads=5, num_kv_heads=2, head_dim=64, device="cpu")


def test_workspace_bytes_count_the_threads_that_plans_count(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: Dict[str, Any] = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "device": "cpu"}
    monkeypatch.setenv("FLASHINFER_NUM_THREADS", "8")
    assert workspace_bytes(**shape) == workspace_bytes(**shape, num_sms=8)


@pytest.mark.parametrize("name", ["qo_indptr_buf", "kv_indptr_buf"])
def test_graph_buffers_of_prefill(name: str) -> None:
    """All say the same number of requests, and are refused before any of them is written."""
    paged: Dict[str, Any] = {
        "qo_indptr_buf": ints(0, 0, 0),
        "paged_kv_indptr_buf": ints(0, 0, 0),
        "paged_kv_indices_buf": ints(0, 0),
        "paged_kv_last_page_len_buf": ints(0, 0),
    }
    if name == "qo_indptr_buf":
        with pytest.raises(InvalidArgumentError, match=r"qo_indptr_buf must have shape \[3\], got \(2,\)"):
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                workspace(), use_cuda_graph=True, **{**paged, name: ints(0, 0)}
            )
    ragged: Dict[str, Any] = {"qo_indptr_buf": ints(0, 0, 0), "kv_indptr_buf": ints(0, 0, 0), name: ints(0, 0)}
    with pytest.raises(InvalidArgumentError, match="kv_indptr_buf must have shape"):
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), use_cuda_graph=True, **ragged)


FAILING = [
    pytest.param({"page_size": 4}, id="lengths"),
    pytest.param({"num_qo_heads": 5}, id="heads"),
    pytest.param({"sm_scale": -1.0}, id="scale"),
    pytest.param({"paged_kv_indices": ints(0)}, id="indices"),
    pytest.param({"qo_indptr": ints(0, 4, 3)}, id="planner"),
]


@pytest.mark.parametrize("with_graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("changes", FAILING)
def test_a_failed_plan_leaves_the_last_one(changes: Dict[str, Any], with_graph: bool) -> None:
    batch = Paged([3, 1], [40, 20])
    buffers: List[Any] = [ints(*[0] * size) for size in (3, 3, 50, 2)] if with_graph else []
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", with_graph, *buffers)
    good: Dict[str, Any] = {
        "qo_indptr": batch.q_indptr,
        "paged_kv_indptr": batch.indptr,
        "paged_kv_indices": batch.indices,
        "paged_kv_last_page_len": batch.last_page_len,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "page_size": 16,
        "causal": True,
    }
    wrapper.plan(**good)
    other = {"paged_kv_indices": batch.indices.flip(0), "sm_scale": 2.0, "causal": False, **changes}
    with pytest.raises((InvalidArgumentError, InvalidTypeError)):
        wrapper.plan(**{**good, **other})
    batch.check(*wrapper.run(batch.q, batch.cache, return_lse=True), causal=True)


def test_threads_share_a_plan() -> None:
    """Split results of one run must not meet those of another: each thread has queries of its own."""
    batches = [Paged([1, 30], [9000, 640], seed=0) for _ in range(4)]
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        batch.q = torch.randn(batch.q.shape).to(batch.dtype)
    shared = plan_of(batches[0])
    assert shared.merge_workers
    results: List[List[Any]] = [[] for _ in batches]
    barrier = threading.Barrier(len(batches))

    def work(index: int) -> None:
        batch = batches[index]
        barrier.wait()
        for _ in range(20):
            results[index].append(attention(batch.q, batch.k, batch.v, plan=shared, page_table=batch.indices))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, runs in zip(batches, results):
        assert len(runs) == 20
        for o, lse in runs:
            batch.check(o, lse, base2=False)


def test_a_run_whose_workspace_is_taken_leaves_it_alone() -> None:
    batch = Paged([1], [20_000])
    buffer = torch.zeros(1 << 20, dtype=torch.uint8)
    planned = plan_of(batch, workspace=Workspace(buffer))
    with planned.workspace.partial_lock:
        o, lse = attention(batch.q, batch.k, batch.v, plan=planned, page_table=batch.indices)
    batch.check(o, lse, base2=False)
    assert planned.merge_workers
    assert not buffer.any()


def test_plans_are_compared_by_identity() -> None:
    batch = Paged([1], [20])
    plans = {plan_of(batch), plan_of(batch)}
    assert len(plans) == 2


def test_planning_is_refused_while_a_graph_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_capture(cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_capture(torch.device("cpu"))
    with pytest.raises(InvalidArgumentError, match="planning cannot be captured"):
        refuse_capture(cuda)


def test_a_newer_plan_ends_the_older_one_on_a_device() -> None:
    """The device is `meta` here: it takes uploads as a GPU does."""
    shared = Workspace(torch.empty(100, dtype=torch.uint8, device="meta"))
    first = shared.upload(slot(64), 64, 64)
    generation = shared.generation
    shared.check_generation(first, generation)
    assert shared.upload(slot(64), 64, 64) is first
    with pytest.raises(WorkspaceError, match="a newer plan has replaced this one"):
        shared.check_generation(first, generation)
    shared.check_generation(first, shared.generation)
    grown = shared.upload(slot(640), 640, 640)
    assert grown is not first
    shared.check_generation(first, generation)  # its buffer was left behind as it is


def test_a_copy_that_waits_keeps_its_memory() -> None:
    staging = Staging(workspace, Event)
    first = staging.take(64)
    first.sent.record()
    second = staging.take(64)
    assert second is not first
    second.sent.record()
    first.sent.done = second.sent.done = True
    assert staging.take(64) is first  # its copy is the older one
    first.sent.record()
    larger = staging.take(1000)
    assert larger is second
    assert larger.buffer.numel() == 1000
    assert first.buffer.numel() == 64


def test_what_a_graph_captured_is_not_written_again() -> None:
    shared = Workspace(torch.empty(100, dtype=torch.uint8, device="meta"))
    first = shared.upload(slot(64), 64, 64)
    shared.note_capture(1, first)
    assert shared.upload(slot(64), 64, 64) is not first
    given = Workspace(torch.empty(100, dtype=torch.uint8, device="meta"), torch.empty(64, dtype=torch.uint8).to("meta"))
    given.note_capture(1, given.upload(slot(64), 64, 64))
    with pytest.raises(WorkspaceError, match="a CUDA graph was captured with the work list"):
        given.upload(slot(64), 64, 64)


def test_lengths_whose_sum_is_beyond_int32() -> None:
    """Pages of all requests may hold more tokens than int32 counts, if those of each do not."""
    queries = flashinfer_attention.lengths.one_query_each(3)
    lengths = flashinfer_attention.lengths.paged_lengths(queries, ints(0, 60, 120, 120), ints(5, 2**24, 0), 2**24)
    assert lengths.kv_len.tolist() == [59 * 2**24 + 5, 60 * 2**24, 0]
    assert lengths.kv_len.dtype == torch.int32
    with pytest.raises(InvalidArgumentError, match=f"request 1 has {128 * 2**24} keys, more than int32 holds"):
        flashinfer_attention.lengths.paged_lengths(queries, ints(0, 1, 129, 129), ints(5, 2**24, 0), 2**24)
