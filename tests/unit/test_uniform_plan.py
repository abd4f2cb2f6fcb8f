"""One request in equal pieces: the closed form of uniform.h, called through a shim that g++ compiles."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_core import compiler, headers, params, planner
from flashinfer_core.errors import InvalidArgumentError

SHIM = """#include "core/uniform.h"
using namespace flashinfer;
extern "C" void item(const UniformWork* work, int32_t group, int32_t kv_heads, int32_t tile_rows, int32_t kv_tile,
                     int32_t index, WorkItem* out) {
  *out = uniform_item(*work, group, kv_heads, tile_rows, kv_tile, index);
}
extern "C" void merge(const UniformWork* work, int32_t group, int32_t, int32_t tile_rows, int32_t,
                      int32_t index, MergeItem* out) {
  *out = uniform_merge(*work, group, tile_rows, index);
}
"""

UniformWork = params.structure("flashinfer_core", "core/work.h", "UniformWork")
WorkItem = params.structure("flashinfer_core", "core/work.h", "WorkItem")
MergeItem = params.structure("flashinfer_core", "core/work.h", "MergeItem")


@dataclass(frozen=True)
class Case:
    """A request and what the kernels fix."""

    q_len: int
    kv_len: int
    group: int
    kv_heads: int
    tile_rows: int
    kv_tile: int
    causal: bool
    window_left: int
    num_workers: int
    max_partial_rows: int
    fixed_piece: int = 0

    def plan(self) -> planner.UniformPlan:
        shape = planner.Shape(**{name: getattr(self, name) for name in planner.Shape._fields})
        return planner.uniform_plan(shape, q_len=self.q_len, kv_len=self.kv_len, max_partial_rows=self.max_partial_rows)

    def work(self, plan: planner.UniformPlan) -> ctypes.Structure:
        lengths = (self.q_len, self.kv_len, plan.tiles, plan.pieces, plan.piece_len)
        return UniformWork(*lengths, int(self.causal), self.window_left)

    def seen(self, row: int) -> tuple[int, int]:
        """Return the first key that a packed row sees and the end of those."""
        position = row // self.group + self.kv_len - self.q_len
        end = max(0, min(self.kv_len, position + 1)) if self.causal else self.kv_len
        return (0 if self.window_left < 0 else min(max(0, position - self.window_left), end)), end


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    includes = [f"-I{root}" for root in headers.roots(headers.package_folder("flashinfer_core") / "kernels")]
    command = [*compiler.cxx().split(), "-std=c++17", "-fPIC", "-shared", *includes, "shim.cpp", "-o", "shim.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


def evaluate(function: Callable[..., None], kind: type[ctypes.Structure], case: Case, count: int) -> list[Any]:
    work, out = case.work(case.plan()), kind()
    found = []
    for index in range(count):
        function(ctypes.byref(work), case.group, case.kv_heads, case.tile_rows, case.kv_tile, index, ctypes.byref(out))
        found.append(kind.from_buffer_copy(out))
    return found


requests = st.builds(
    Case,
    q_len=st.one_of(st.just(1), st.integers(0, 60)),
    kv_len=st.integers(0, 900),
    group=st.sampled_from([1, 3, 4, 7]),
    kv_heads=st.integers(1, 3),
    tile_rows=st.sampled_from([1, 2, 16, 64]),
    kv_tile=st.sampled_from([1, 8, 64]),
    causal=st.booleans(),
    window_left=st.one_of(st.just(-1), st.integers(0, 900)),
    num_workers=st.one_of(st.integers(1, 12), st.integers(1, 300)),
    max_partial_rows=st.one_of(st.just(1 << 40), st.integers(0, 1000)),
)


@settings(max_examples=150, deadline=None)
@given(case=requests)
def test_every_request_is_covered_once(shim: ctypes.CDLL, case: Case) -> None:
    plan, rows = case.plan(), case.q_len * case.group
    assert plan.num_items == case.kv_heads * plan.tiles * plan.pieces
    items = evaluate(shim.item, WorkItem, case, plan.num_items)
    covered = np.zeros((case.kv_heads, rows, case.kv_len), dtype=np.int32)
    for item in items:
        assert (item.q_start, item.q_len, item.kv_start, item.kv_len) == (0, case.q_len, 0, case.kv_len)
        last = min(item.row_begin + case.tile_rows, rows)
        first, end = case.seen(item.row_begin)[0] // case.kv_tile * case.kv_tile, case.seen(last - 1)[1]
        assert min(first, end) <= item.kv_begin <= item.kv_end <= end
        assert item.kv_begin % case.kv_tile == 0 or item.kv_begin == item.kv_end
        covered[item.kv_head, item.row_begin : last, item.kv_begin : item.kv_end] += 1
    for row in range(rows):
        first, end = case.seen(row)
        assert (covered[:, row, first:end] == 1).all()
    assert covered.max(initial=0) <= 1
    tiles = [item.row_begin for item in items]
    assert tiles == sorted(tiles, reverse=True)


@settings(max_examples=150, deadline=None)
@given(case=requests)
def test_partial_rows_fit_and_merge_into_their_tiles(shim: ctypes.CDLL, case: Case) -> None:
    plan = case.plan()
    items = evaluate(shim.item, WorkItem, case, plan.num_items)
    if plan.pieces == 1:
        assert plan.partial_rows == 0
        assert all(item.partial == -1 for item in items)
        return
    assert sorted(item.partial for item in items) == list(range(0, plan.partial_rows, case.tile_rows))
    assert plan.partial_rows <= case.max_partial_rows
    assert (plan.pieces - 1) * plan.piece_len < case.kv_len
    slots = {item.partial: (item.kv_head, item.row_begin) for item in items}
    merges = evaluate(shim.merge, MergeItem, case, case.kv_heads * plan.tiles)
    for merge in merges:
        assert merge.rows == min(case.tile_rows, case.q_len * case.group - merge.row_begin)
        assert merge.pieces == plan.pieces
        for piece in range(merge.pieces):
            assert slots.pop(merge.partial + piece * case.tile_rows) == (merge.kv_head, merge.row_begin)
    assert not slots


@pytest.mark.parametrize(
    ("kv_len", "num_workers", "pieces"),
    [
        pytest.param(8192, 264, 32, id="long-fills-the-gpu"),
        pytest.param(64, 264, 1, id="one-tile-stays-whole"),
        pytest.param(8192, 8, 1, id="heads-alone-fill-it"),
        pytest.param(0, 264, 1, id="no-key"),
    ],
)
def test_pieces_of_a_decode(kv_len: int, num_workers: int, pieces: int) -> None:
    assert Case(1, kv_len, 4, 8, 16, 64, True, -1, num_workers, 1 << 20).plan().pieces == pieces


def test_a_window_is_cut_in_pieces_of_its_own() -> None:
    assert Case(1, 1 << 20, 4, 8, 16, 64, True, 4095, 264, 1 << 20).plan() == (1, 32, 128, 256, 4096)


def test_the_longest_request_is_planned_in_64_bits() -> None:
    plan = Case(1, 2**31 - 100, 1, 1, 16, 64, True, -1, 264, 1 << 20).plan()
    assert (plan.pieces - 1) * plan.piece_len < 2**31 - 100 <= plan.pieces * plan.piece_len


@pytest.mark.parametrize(("q_len", "kv_len", "name"), [(-1, 4, "q_len"), (4, -1, "kv_len"), (4, 2**31 - 1, "kv_len")])
def test_bad_lengths_are_named(q_len: int, kv_len: int, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}"):
        Case(q_len, kv_len, 1, 1, 16, 64, True, -1, 8, 0).plan()
