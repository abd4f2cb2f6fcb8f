"""Plans cover every visible (row, key) pair once, in balanced shares, inside their buffers; for any batch.

A worker's load is counted as the planner counts it: key tiles, plus one for each item.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError

Array = npt.NDArray[np.int32]
GUARD = 64
POISON = 0xA5
EVERYTHING = 1 << 40

ITEM = np.dtype(
    [(name, np.int32) for name in ("q_start", "q_len", "kv_start", "kv_len", "kv_head", "row_begin", "kv_begin")]
    + [("kv_end", np.int32), ("partial", np.int32), ("request", np.int32), ("merge", np.int32), ("pad", np.int32)]
)
MERGE = np.dtype(
    [(name, np.int32) for name in ("q_start", "q_len", "kv_head", "row_begin", "rows", "partial", "pieces", "pad")]
)


@dataclass(frozen=True)
class Case:
    """A batch and what the kernels fix."""

    lengths: list[tuple[int, int]]  # q_len, kv_len
    group: int = 1
    kv_heads: int = 1
    tile_rows: int = 16
    kv_tile: int = 64
    causal: bool = False
    window_left: int = -1
    num_workers: int = 8
    max_partial_rows: int = EVERYTHING
    fixed_piece: int = 0

    @property
    def shape(self) -> planner.Shape:
        return planner.Shape(**{name: getattr(self, name) for name in planner.Shape._fields})

    @property
    def q_indptr(self) -> Array:
        return np.cumsum([0, *(q_len for q_len, _ in self.lengths)]).astype(np.int32)

    @property
    def kv_indptr(self) -> Array:
        return np.arange(len(self.lengths) + 1, dtype=np.int32) * 3

    @property
    def kv_len(self) -> Array:
        return np.array([kv_len for _, kv_len in self.lengths], dtype=np.int32)

    @property
    def limits(self) -> planner.PlanLimits:
        total_q = sum(q_len for q_len, _ in self.lengths)
        return planner.plan_limits(self.shape, total_q=total_q, num_requests=len(self.lengths))

    def key_tiles(self, keys: int) -> int:
        return -(-keys // self.kv_tile)

    def visible(self, q_len: int, kv_len: int, row: int) -> tuple[int, int]:
        """Return the first key that a packed row sees and the end of those."""
        position = row // self.group + kv_len - q_len
        end = max(0, min(kv_len, position + 1)) if self.causal else kv_len
        return (0 if self.window_left < 0 else min(max(0, position - self.window_left), end)), end

    def span(self, q_len: int, kv_len: int, first_row: int) -> tuple[int, int]:
        """Return the keys that a tile reads: from the key tile of its first visible key, to its last visible key."""
        last_row = min(first_row + self.tile_rows, q_len * self.group) - 1
        end = self.visible(q_len, kv_len, last_row)[1]
        return min(self.visible(q_len, kv_len, first_row)[0] // self.kv_tile * self.kv_tile, end), end


@dataclass(frozen=True)
class Planned:
    """A plan's buffer, read back."""

    counts: planner.PlanCounts
    limits: planner.PlanLimits
    worker_indptr: Array
    merges: npt.NDArray[np.void]
    items: npt.NDArray[np.void]

    def load(self, case: Case, worker: int) -> int:
        items = self.items[self.worker_indptr[worker] : self.worker_indptr[worker + 1]]
        return sum(case.key_tiles(int(item["kv_end"] - item["kv_begin"])) + 1 for item in items)


def run_plan(case: Case, buffer: npt.NDArray[np.uint8], out_bytes: int) -> planner.PlanCounts:
    q_indptr, kv_indptr, kv_len = case.q_indptr, case.kv_indptr, case.kv_len
    return planner.plan(
        case.shape,
        q_indptr=q_indptr.ctypes.data,
        kv_indptr=kv_indptr.ctypes.data,
        kv_len=kv_len.ctypes.data,
        num_requests=len(case.lengths),
        max_partial_rows=case.max_partial_rows,
        max_merges=case.limits.merges,
        out=buffer.ctypes.data + GUARD,
        out_bytes=out_bytes,
    )


def make_plan(case: Case) -> Planned:
    """Plan into a buffer of exactly `plan_limits`, between guards that must survive."""
    limits = case.limits
    size = limits.bytes
    buffer = np.full(size + 2 * GUARD, POISON, dtype=np.uint8)
    counts = run_plan(case, buffer, size)
    assert (buffer[:GUARD] == POISON).all()
    assert (buffer[GUARD + counts.used_bytes :] == POISON).all()
    out = buffer[GUARD : GUARD + size]
    offsets = planner.plan_offsets(case.num_workers, limits.merges)
    assert out[offsets.num_merges :][:4].view(np.int32)[0] == counts.num_merges
    assert not out[offsets.arrivals :][: 4 * counts.num_merges].any()
    return Planned(
        counts,
        limits,
        out[: 4 * (case.num_workers + 1)].view(np.int32),
        out[offsets.merges :][: counts.num_merges * MERGE.itemsize].view(MERGE),
        out[offsets.items : counts.used_bytes].view(ITEM),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    longest = draw(st.sampled_from([3, 40, 700]))
    lengths = st.tuples(st.one_of(st.just(1), st.integers(0, 60)), st.integers(0, longest))
    tile_rows = draw(st.sampled_from([1, 2, 16, 64]))
    return Case(
        lengths=draw(st.lists(lengths, max_size=7)),
        group=draw(st.sampled_from([1, 3, 4, 7])),
        kv_heads=draw(st.integers(1, 3)),
        tile_rows=tile_rows,
        kv_tile=draw(st.sampled_from([1, 8, 64])),
        causal=draw(st.booleans()),
        window_left=draw(st.one_of(st.just(-1), st.integers(0, 3), st.integers(0, longest))),
        num_workers=draw(st.one_of(st.integers(1, 12), st.integers(1, 300))),
        max_partial_rows=draw(st.one_of(st.just(EVERYTHING), st.integers(0, 40 * tile_rows))),
    )


@st.composite
def fixed_cases(draw: st.DrawFn) -> Case:
    return replace(draw(cases()), fixed_piece=draw(st.integers(1, 20)), max_partial_rows=EVERYTHING)


def check_coverage(case: Case, planned: Planned) -> None:
    q_indptr = case.q_indptr
    for request, (q_len, kv_len) in enumerate(case.lengths):
        rows = q_len * case.group
        for kv_head in range(case.kv_heads):
            covered = np.zeros((rows, kv_len), dtype=np.int32)
            tiles = np.zeros(rows, dtype=np.int32)
            mine = (planned.items["q_start"] == q_indptr[request]) & (planned.items["kv_head"] == kv_head)
            for item in planned.items[mine & (q_len > 0)]:
                assert (item["q_len"], item["kv_start"], item["kv_len"]) == (q_len, 3 * request, kv_len)
                last = min(item["row_begin"] + case.tile_rows, rows)
                first, end = case.span(q_len, kv_len, int(item["row_begin"]))
                assert first <= item["kv_begin"] <= item["kv_end"] <= end
                assert item["kv_begin"] % case.kv_tile == 0
                assert item["kv_begin"] < item["kv_end"] or first == end
                covered[item["row_begin"] : last, item["kv_begin"] : item["kv_end"]] += 1
                tiles[item["row_begin"] : last] += 1
            assert (tiles >= 1).all()
            for row in range(rows):
                first, end = case.visible(q_len, kv_len, row)
                assert (covered[row, first:end] == 1).all()
                span = case.span(q_len, kv_len, row // case.tile_rows * case.tile_rows)
                assert covered[row].sum() == span[1] - span[0]
    assert planned.counts.num_items == 0 or (planned.items["q_len"] > 0).all()


def check_partials(case: Case, planned: Planned) -> None:
    pieces = planned.items[planned.items["partial"] >= 0]
    slots = np.arange(len(pieces)) * case.tile_rows
    assert (np.sort(pieces["partial"]) == slots).all()
    assert planned.counts.partial_rows == len(pieces) * case.tile_rows
    assert planned.counts.partial_rows <= case.max_partial_rows
    assert planned.counts.num_merges <= planned.limits.merges
    if case.fixed_piece == 0:
        assert planned.counts.partial_rows <= planner.useful_partial_rows(case.tile_rows, case.num_workers)
        assert planned.counts.num_merges <= case.num_workers - 1
    assert planned.merges["pieces"].sum() == len(pieces)
    for index, merge in enumerate(planned.merges):
        assert merge["pieces"] >= 2
        assert merge["rows"] == min(case.tile_rows, merge["q_len"] * case.group - merge["row_begin"])
        end = merge["partial"] + merge["pieces"] * case.tile_rows
        of_tile = pieces[(pieces["partial"] >= merge["partial"]) & (pieces["partial"] < end)]
        for name in ("q_start", "q_len", "kv_head", "row_begin"):
            assert (of_tile[name] == merge[name]).all()
        assert (of_tile["merge"] == index).all()
        assert (of_tile["kv_begin"][1:] == of_tile["kv_end"][:-1]).all()


def check_balance(case: Case, planned: Planned) -> None:
    assert planned.worker_indptr[0] == 0
    assert planned.worker_indptr[-1] == planned.counts.num_items
    assert (np.diff(planned.worker_indptr) >= 0).all()
    tiles: dict[tuple[int, int, int], int] = {}
    pieces: list[int] = []
    for item in planned.items:
        tile = (int(item["q_start"]), int(item["kv_head"]), int(item["row_begin"]))
        pieces.append(case.key_tiles(int(item["kv_end"] - item["kv_begin"])))
        tiles[tile] = tiles.get(tile, 0) + pieces[-1]
    costs = [key_tiles + 1 for key_tiles in tiles.values()]
    bound = -(-sum(costs) // case.num_workers) + 1
    if case.max_partial_rows < planner.useful_partial_rows(case.tile_rows, case.num_workers):
        bound += max([case.key_tiles(kv_len) for _, kv_len in case.lengths], default=0)
    if case.fixed_piece > 0:  # a piece is dealt whole, and its start was counted once for each tile
        bound = -(-sum(costs) // case.num_workers) * 2 + max(pieces, default=0) + 2
    assert max(planned.load(case, worker) for worker in range(case.num_workers)) <= bound


@settings(max_examples=250, deadline=None)
@given(st.one_of(cases(), fixed_cases()))
def test_any_batch_is_covered_once_balanced_and_inside_its_buffers(case: Case) -> None:
    planned = make_plan(case)
    check_coverage(case, planned)
    check_partials(case, planned)
    check_balance(case, planned)


@pytest.mark.parametrize("window_left", [-1, 0, 100], ids=["all", "itself", "window-100"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([], id="no-request"),
        pytest.param([(0, 0), (0, 9)], id="no-query"),
        pytest.param([(3, 0)], id="no-key"),
        pytest.param([(200, 7)], id="more-queries-than-keys"),
        pytest.param([(1, 10_000)], id="long-decode"),
        pytest.param([(1, 1)] * 129, id="129-short"),
        pytest.param([(1, 5000), (1, 1), (90, 90), (0, 4), (1, 0)], id="mixed"),
    ],
)
def test_edges(lengths: list[tuple[int, int]], causal: bool, window_left: int) -> None:
    for num_workers in (1, 2, 264):
        for max_partial_rows in (0, 1, 31, 32, 33, 200, EVERYTHING):
            case = Case(
                lengths,
                4,
                2,
                causal=causal,
                window_left=window_left,
                num_workers=num_workers,
                max_partial_rows=max_partial_rows,
            )
            planned = make_plan(case)
            check_coverage(case, planned)
            check_partials(case, planned)
            check_balance(case, planned)


def test_totals_beyond_32_bits() -> None:
    longest = 2**31 - 1 - 16  # the limit of kv_len
    case = Case([(1, longest)] * 40, kv_heads=8, kv_tile=16, num_workers=1000)
    planned = make_plan(case)
    assert sum(int(item["kv_end"]) - int(item["kv_begin"]) for item in planned.items) == 40 * 8 * longest
    check_partials(case, planned)
    check_balance(case, planned)


@pytest.mark.parametrize("max_pieces", [16, 24, 50, 100])
def test_a_small_buffer_is_shared_among_long_tiles(max_pieces: int) -> None:
    case = Case([(1, 128 * 64)], kv_heads=8, num_workers=132, max_partial_rows=max_pieces * 16)
    planned = make_plan(case)
    check_coverage(case, planned)
    assert max(planned.load(case, worker) for worker in range(132)) <= -(-128 // (max_pieces // 8)) + 1


def test_a_buffer_that_is_too_small_stays_untouched() -> None:
    case = Case([(1, 300)] * 5)
    size = case.limits.bytes
    buffer = np.full(size + 2 * GUARD, POISON, dtype=np.uint8)
    with pytest.raises(WorkspaceError, match=f"{size} bytes and 7 merges, but its buffer has {size - 1} and 8"):
        run_plan(case, buffer, size - 1)
    assert (buffer == POISON).all()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("q_indptr", [0, 2, 1], r"q_indptr\[2\] = 1 follows 2"),
        ("q_indptr", [-1, 2, 3], r"q_indptr\[0\] must not be negative, got -1"),
        ("kv_indptr", [0, 9, 4], r"kv_indptr\[2\] = 4 follows 9"),
        ("kv_len", [5, -2], r"kv_len\[1\] must not be negative, got -2"),
        ("num_requests", -1, "num_requests must not be negative, got -1"),
        ("group", 0, "group must be at least 1, got 0"),
        ("kv_heads", 0, "kv_heads must be at least 1"),
        ("tile_rows", -16, "tile_rows must be at least 1"),
        ("kv_tile", 0, "kv_tile must be at least 1"),
        ("window_left", -2, "window_left must be at least -1, got -2"),
        ("fixed_piece", -1, "fixed_piece must not be negative, got -1"),
        ("num_workers", 0, "num_workers must be at least 1"),
        ("num_workers", 1 << 30, "num_workers \\* tile_rows must be below"),
        ("num_workers", 1 << 40, "not an integer that fits"),
        ("max_partial_rows", -1, "max_partial_rows must not be negative"),
        ("group", 1 << 30, "group \\* kv_heads must be at most"),
        ("out_bytes", 0, "buffer has 0"),
    ],
)
def test_bad_input_is_named(field: str, value: object, text: str) -> None:
    arrays = {"q_indptr": [0, 1, 2], "kv_indptr": [0, 1, 2], "kv_len": [5, 6]}
    arrays.update({field: value} if isinstance(value, list) else {})
    held = {name: np.array(data, dtype=np.int32) for name, data in arrays.items()}
    buffer = np.zeros(1 << 16, dtype=np.uint8)
    shape: dict[str, Any] = {
        "group": 4,
        "kv_heads": 2,
        "tile_rows": 16,
        "kv_tile": 64,
        "causal": True,
        "num_workers": 8,
    }
    arguments = {"num_requests": 2, "max_partial_rows": 0, "max_merges": 8}
    arguments.update(out=buffer.ctypes.data, out_bytes=buffer.nbytes)
    arguments.update({name: array.ctypes.data for name, array in held.items()})
    if isinstance(value, int):
        (shape if field in planner.Shape._fields else arguments)[field] = value
    with pytest.raises((InvalidArgumentError, WorkspaceError), match=text):
        planner.plan(planner.Shape(**shape), **arguments)


def test_a_request_of_too_many_rows_is_refused() -> None:
    case = Case([(2**31 - 1, 1)], group=2)
    with pytest.raises(InvalidArgumentError, match="request 0 has 4294967294 packed rows"):
        run_plan(case, np.zeros(1, dtype=np.uint8), 0)


@pytest.mark.parametrize(("excess", "refused"), [(0, False), (1, True)])
def test_a_request_of_too_many_keys_is_refused(excess: int, refused: bool) -> None:
    case = Case([(1, 2**31 - 1 - Case([]).kv_tile + excess)])
    out = np.zeros(1 << 16, dtype=np.uint8)
    if not refused:
        assert run_plan(case, out, out.nbytes - GUARD).num_items > 1
        return
    with pytest.raises(InvalidArgumentError, match=r"kv_len\[0\] must be at most .* = 2147483583, got 2147483584"):
        run_plan(case, out, out.nbytes - GUARD)


def test_offsets_depend_on_workers_and_merges_alone() -> None:
    for num_workers, merges in ((1, 1), (2, 2), (3, 50), (132, 132), (1000, 77)):
        offsets = planner.plan_offsets(num_workers, merges)
        assert offsets.num_merges == 4 * (num_workers + 1)
        assert offsets.num_merges + 4 <= offsets.merges < offsets.num_merges + 4 + 16
        assert offsets.arrivals == offsets.merges + 32 * merges
        assert offsets.arrivals + 4 * merges <= offsets.items < offsets.arrivals + 4 * merges + 16
        assert offsets.merges % 16 == offsets.items % 16 == 0


def test_a_window_costs_what_it_sees() -> None:
    long, short = (make_plan(Case([(1, keys)] * 3, window_left=1000, num_workers=1)) for keys in (100_000, 2000))
    assert abs(long.load(Case([]), 0) - short.load(Case([]), 0)) <= 3


def test_one_worker_never_splits() -> None:
    planned = make_plan(replace(Case([(1, 9000), (300, 300)]), num_workers=1))
    assert planned.counts.num_merges == planned.counts.partial_rows == 0
