"""The native operator against fp64: plans, strides, workspaces, threads, and what `choose` picks."""

from __future__ import annotations

import math
import threading
from typing import Any, List

import pytest
import torch

import reference
from batches import HUGE, Paged, plan_of, poisoned, where
from flashinfer_attention import Workspace, attention, plan_attention, single, variants, workspace_bytes
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError
from flashinfer_core.targets import TARGETS

MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def run(batch: Paged, planned: Any, **options: Any) -> Any:
    table = batch.indices.to(batch.device)
    return attention(batch.q, batch.k, batch.v, plan=planned, page_table=table, **options)


@MASKS
@pytest.mark.parametrize(("device", "dtype", "dim"), where(dims=(64, 128)))
def test_lse_is_natural(device: str, dtype: torch.dtype, dim: int, causal: bool) -> None:
    batch = Paged([40, 1, 0, 3], [50, 1000, 5, 0], dtype=dtype, dim=dim, device=device)
    batch.check(*run(batch, plan_of(batch, causal=causal)), base2=False, causal=causal)


def test_outputs_are_written_in_place(device: str) -> None:
    batch = Paged([40, 1], [50, 1000], device=device)
    out = batch.q.new_full((41, batch.heads + 1, batch.dim + 8), math.nan)[:, 1:, :-8]
    lse = poisoned(batch.q.shape[:2], torch.float32, device)
    got = run(batch, plan_of(batch), out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    batch.check(out, lse, base2=False)


def test_fewer_keys_than_the_pages_hold(device: str) -> None:
    batch = Paged([2, 1], [100, 64], device=device)
    kept = [90, 33]
    planned = plan_attention(
        q_indptr=batch.q_indptr,
        kv_indptr=batch.indptr,
        kv_len=torch.tensor(kept, dtype=torch.int32),
        num_qo_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        head_dim=batch.dim,
        page_size=batch.page_size,
        dtype=batch.dtype,
        device=device,
    )
    o, lse = run(batch, planned)
    batch.kv_lens = kept
    batch.check(o, lse, base2=False)


def test_keys_and_values_of_different_strides(device: str) -> None:
    batch = Paged([2, 1], [100, 64], device=device)
    batch.v = batch.v.transpose(1, 2).contiguous().transpose(1, 2)
    assert batch.k.stride() != batch.v.stride()
    batch.check(*run(batch, plan_of(batch)), base2=False)


@MASKS
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 130, 1000])
def test_splits_adapt_to_the_workspace(device: str, rows: int, causal: bool) -> None:
    batch = Paged([1, 70], [6000, 3000], device=device)
    buffer = poisoned((256 + rows * 65,), torch.float32, device).view(torch.uint8)
    batch.check(*run(batch, plan_of(batch, workspace=Workspace(buffer), causal=causal)), base2=False, causal=causal)


def test_nothing_is_written_behind_the_workspace(device: str) -> None:
    batch = Paged([1], [20_000], device=device)
    buffer = torch.zeros(200_000, dtype=torch.uint8, device=device)
    planned = plan_of(batch, workspace=Workspace(buffer[:100_000]))
    assert planned.merge_workers
    run(batch, planned)
    assert buffer[:100_000].any()
    assert not buffer[100_000:].any()


def test_more_than_workspace_bytes_splits_no_better(device: str) -> None:
    batch = Paged([1, 1], [20_000, 300], device=device)
    size = workspace_bytes(num_qo_heads=batch.heads, num_kv_heads=batch.kv_heads, head_dim=batch.dim, device=device)
    rows = [
        plan_of(batch, workspace=Workspace(torch.empty(bytes_, dtype=torch.uint8, device=device))).partial.rows
        for bytes_ in (0, size // 2, size, 4 * size)
    ]
    assert rows[0] == 0 < rows[1] <= rows[2] == rows[3]


def test_workspace_bytes_asks_no_gpu() -> None:
    small = workspace_bytes(num_qo_heads=32, num_kv_heads=8, head_dim=128, num_sms=16)
    large = workspace_bytes(num_qo_heads=32, num_kv_heads=8, head_dim=128, num_sms=132, max_q_len=1000)
    assert 0 < small < large < 128 << 20


def test_a_plan_serves_many_runs_and_threads(device: str) -> None:
    batches = [Paged([1, 30], [3000, 64], seed=seed, device=device) for seed in range(4)]
    plans = [plan_of(batch) for batch in batches]
    results: List[Any] = [None] * len(batches)

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = run(batches[index], plans[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, (o, lse) in zip(batches, results):
        batch.check(o, lse, base2=False)


def test_a_plan_keeps_its_lengths(device: str) -> None:
    batch = Paged([1, 30], [300, 64], device=device)
    expected = batch.expected()
    planned = plan_of(batch)
    batch.q_indptr.zero_()
    batch.indptr.zero_()
    o, _ = run(batch, planned)
    reference.assert_close(o.cpu(), expected[0], batch.dtype)


def test_a_fixed_workspace_keeps_its_first_plan(device: str) -> None:
    workspace = Workspace(torch.empty(1 << 20, dtype=torch.uint8, device=device), fixed=True)
    first = Paged([30, 4], [400, 60], device=device)
    plan_of(first, workspace=workspace)
    batch = Paged([0, 34], [3, 5000], device=device, seed=2)
    batch.check(*run(batch, plan_of(batch, workspace=workspace)), base2=False)
    with pytest.raises(WorkspaceError, match=r"35 query tokens.*34"):
        plan_of(Paged([30, 5], [400, 60], device=device), workspace=workspace)
    with pytest.raises(InvalidArgumentError, match="CUDA graph"):
        plan_of(Paged([1, 1], [4, 6], heads=8, device=device), workspace=workspace)


@MASKS
@pytest.mark.parametrize(("device", "dtype", "dim"), where())
def test_single(device: str, dtype: torch.dtype, dim: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, dim).to(dtype).to(device) for n, heads in [(70, 6), (900, 2), (900, 2)])
    out, lse = poisoned(q.shape, dtype, device), poisoned(q.shape[:2], torch.float32, device)
    single(q, k, v, causal=causal, out=out, lse=lse)
    expected, expected_lse = reference.attention(q.cpu(), k.cpu(), v.cpu(), causal=causal)
    reference.assert_close(out.cpu(), expected, dtype)
    reference.assert_lse_close(lse.cpu(), expected_lse)


def test_single_with_rows_beyond_31_bits(device: str) -> None:
    """Three keys 2^31 elements apart, queries and outputs as far: a CPU commits only the pages that are written."""
    apart, dim = 2**31 + 64, 64
    keys = torch.empty(2 * apart + 2 * dim, dtype=torch.float16, device=device)
    far = keys.as_strided((3, 1, dim), (apart, dim, 1))
    values = keys.as_strided((3, 1, dim), (apart, dim, 1), dim)
    torch.manual_seed(0)
    near, near_values, q = (torch.randn(3, 1, dim).half() for _ in range(3))
    far.copy_(near)
    values.copy_(near_values)
    wide = torch.empty(2 * apart + dim, dtype=torch.float16, device=device).as_strided((3, 1, dim), (apart, dim, 1))
    wide.copy_(q)
    o, lse = single(wide, far, values, causal=True, out=wide)
    expected, expected_lse = reference.attention(q, near, near_values, causal=True)
    reference.assert_close(o.cpu(), expected, torch.float16)
    reference.assert_lse_close(lse.cpu(), expected_lse)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4], ids=lambda scale: f"logits-{scale:g}")
def test_extreme_logits(device: str, scale: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64).half().to(device) for n in (20, 300, 300))
    o, lse = single(q, k, v, sm_scale=scale)
    expected, expected_lse = reference.attention(q.cpu(), k.cpu(), v.cpu(), sm_scale=scale)
    assert o.isfinite().all()
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-3)
    if scale < 1e3:  # beyond, fp32 scores of 1e5 no longer say which of two near keys is the larger
        torch.testing.assert_close(o.cpu().double(), expected, rtol=0, atol=5e-3)


def chosen(target: str, dtype: str, dim: int, rows: int, general: bool) -> variants.AnyAttention:
    return variants.choose(
        target, dtype=dtype, kv_dtype=dtype, head_dim=dim, head_dim_vo=dim, max_rows=rows, general=general
    )


@pytest.mark.parametrize("target", list(TARGETS))
def test_choose_picks_what_ships(target: str) -> None:
    dtypes = ("f16", "bf16") if not target.endswith("_75") else ("f16",)
    shipped = set(variants.shipped(target))
    for dtype in dtypes:
        for dim in variants.SUPPORT["cuda"].head_dims:
            for rows in (1, 8, 16, 17, 64, 65, 1000):
                plain, general = (chosen(target, dtype, dim, rows, general) for general in (False, True))
                assert {plain, general} <= shipped
                assert general.tile_rows == plain.tile_rows  # a plan for one serves the other
    names = [variant.name for variant in variants.shipped(target)]
    assert len(set(names)) == len(names)


def test_a_page_table_with_a_row_for_each_request(device: str) -> None:
    batch = Paged([2, 0, 1, 3], [100, 5, 0, 64], device=device)
    width, indptr = 9, batch.indptr.tolist()
    rows = torch.full((6, width), HUGE, dtype=torch.int32)  # longer and wider than the batch
    for request in range(4):
        pages = batch.indices[indptr[request] : indptr[request + 1]]
        rows[request, : pages.shape[0]] = pages
    planned = plan_rows(batch, width)
    o, lse = attention(batch.q, batch.k, batch.v, plan=planned, page_table=rows.to(device))
    batch.check(o, lse, base2=False)
    with pytest.raises(InvalidArgumentError, match=r"page_table must have shape \[any, 9\], got \(6, 8\)"):
        attention(batch.q, batch.k, batch.v, plan=planned, page_table=rows[:, :8].to(device))
    with pytest.raises(InvalidArgumentError, match="page_table must be contiguous"):
        attention(batch.q, batch.k, batch.v, plan=plan_rows(batch, 8), page_table=rows.to(device)[:, :8])
    with pytest.raises(InvalidArgumentError, match="at least 36 entries, got 27"):
        attention(batch.q, batch.k, batch.v, plan=planned, page_table=rows[:3].to(device))
    with pytest.raises(InvalidArgumentError, match="request 0 has 100 keys"):
        plan_rows(batch, 6)
    with pytest.raises(InvalidArgumentError, match="give either kv_indptr, or with pages max_pages"):
        plan_of(batch, max_pages=width)
    with pytest.raises(InvalidArgumentError, match="more than int32 counts"):
        plan_rows(batch, 2**30)


def plan_rows(batch: Paged, width: int) -> Any:
    return plan_attention(
        q_indptr=batch.q_indptr,
        kv_len=batch.kv_len,
        max_pages=width,
        num_qo_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        head_dim=batch.dim,
        page_size=batch.page_size,
        dtype=batch.dtype,
        device=batch.device,
    )


@pytest.mark.parametrize("form", ["csr", "rows"])
def test_a_cpu_reads_the_table_before_every_run(form: str) -> None:
    """An accepted call is remembered; what its table holds may have changed since."""
    q, (k, v) = torch.randn(2, 4, 64), torch.randn(2, 8, 16, 2, 64)
    table = torch.tensor([0, 1, 2, 3] if form == "csr" else [[0, 1], [2, 3]], dtype=torch.int32)
    shape: Any = {"kv_indptr": torch.tensor([0, 2, 4], dtype=torch.int32)} if form == "csr" else {"max_pages": 2}
    plan = plan_attention(
        q_indptr=torch.tensor([0, 1, 2], dtype=torch.int32),
        kv_len=torch.tensor([20, 30], dtype=torch.int32),
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=64,
        page_size=16,
        dtype=torch.float32,
        device="cpu",
        **shape,
    )
    for _ in range(2):
        attention(q, k, v, plan=plan, page_table=table)
    table.view(-1)[3] = 8
    with pytest.raises(InvalidArgumentError, match=r"page_table names page 8 as page 1 of request 1, .* 8 pages"):
        attention(q, k, v, plan=plan, page_table=table)
