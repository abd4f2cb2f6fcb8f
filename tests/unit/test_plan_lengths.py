"""The plan that a team of threads makes is that of one thread, to the byte; here the threads are the host's."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_core import compiler, headers, params, planner

SHIM = """#include "core/plan_lengths.h"
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
using namespace flashinfer;

struct Shared {
  std::mutex mutex;
  std::condition_variable everyone;
  int waiting = 0, round = 0, size;
  std::vector<std::vector<unsigned char>> values;
  void sync() {
    std::unique_lock<std::mutex> lock(mutex);
    const int mine = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      everyone.notify_all();
    } else {
      everyone.wait(lock, [&] { return round != mine; });
    }
  }
};

struct Threads {
  Shared& shared;
  int32_t mine;
  int32_t size() const { return shared.size; }
  int32_t index() const { return mine; }
  void sync() const { shared.sync(); }
  template <class T>
  T sum_to(const T& value, int32_t end) const {
    shared.sync();
    auto* bytes = reinterpret_cast<const unsigned char*>(&value);
    shared.values[mine].assign(bytes, bytes + sizeof(T));
    shared.sync();
    T sum;
    for (int32_t i = 0; i < end; ++i) sum.add(*reinterpret_cast<const T*>(shared.values[i].data()));
    return sum;
  }
  template <class T>
  T exclusive(const T& value) const { return sum_to(value, mine); }
  template <class T>
  T total(const T& value) const { return sum_to(value, size()); }
};

extern "C" int64_t sizes(int32_t which) {
  return which == 0 ? sizeof(PlanSums) : which == 1 ? sizeof(WorkerEnd) : sizeof(PlanCut);
}

extern "C" void plan_by(int32_t size, const PlanParams* p) {
  Shared shared;
  shared.size = size;
  shared.values.resize(size);
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < size; ++i) threads.emplace_back([&, i] { plan_lengths(Threads{shared, i}, *p); });
  for (auto& thread : threads) thread.join();
}
"""

PlanParams = params.structure("flashinfer_core", "core/plan_params.h", "PlanParams")
PAGE = 16


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    includes = [f"-I{root}" for root in headers.roots(headers.package_folder("flashinfer_core") / "kernels")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread"]
    subprocess.run([*compiler.cxx().split(), *flags, *includes, "shim.cpp", "-o", "shim.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.sizes.restype = ctypes.c_int64
    return library


def ints(values: Any) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.int32)


@dataclass(frozen=True)
class Batch:
    """Lengths in pages, and what the kernels fix."""

    lengths: list[tuple[int, int]]
    shape: planner.Shape
    max_partial_rows: int
    one_query_each: bool

    @property
    def pages(self) -> list[int]:
        return [-(-kv_len // PAGE) for _, kv_len in self.lengths]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    one_query_each = draw(st.booleans())
    q_len = st.just(1) if one_query_each else st.one_of(st.just(1), st.integers(0, 90))
    kv_len = st.one_of(st.integers(0, 40), st.integers(0, 3000))
    tile_rows = draw(st.sampled_from([1, 16, 64]))
    return Batch(
        lengths=draw(st.lists(st.tuples(q_len, kv_len), max_size=12)),
        shape=planner.Shape(
            group=draw(st.sampled_from([1, 3, 4])),
            kv_heads=draw(st.integers(1, 3)),
            tile_rows=tile_rows,
            kv_tile=draw(st.sampled_from([8, 64])),
            causal=draw(st.booleans()),
            num_workers=draw(st.one_of(st.integers(1, 12), st.integers(1, 300))),
            window_left=draw(st.one_of(st.just(-1), st.integers(0, 500))),
            fixed_piece=draw(st.one_of(st.just(0), st.integers(1, 20))),
        ),
        max_partial_rows=draw(st.one_of(st.just(1 << 30), st.integers(0, 40 * tile_rows))),
        one_query_each=one_query_each,
    )


class Planned:
    """Buffers of one plan, and how to fill them in two ways."""

    def __init__(self, batch: Batch) -> None:
        self.batch, shape = batch, batch.shape
        self.requests = len(batch.lengths)
        self.q_indptr = ints(np.cumsum([0, *(q_len for q_len, _ in batch.lengths)]))
        self.kv_indptr = ints(np.cumsum([0, *batch.pages]))
        self.last = ints([kv - PAGE * (n - 1) if n else 77 for (_, kv), n in zip(batch.lengths, batch.pages)])
        self.lengths = np.full(3 * self.requests + 2, -5, dtype=np.int32)
        self.limits = planner.plan_limits(shape, total_q=int(self.q_indptr[-1]), num_requests=self.requests)
        self.offsets = planner.plan_offsets(shape.num_workers, self.limits.merges)
        self.out = np.full(self.limits.bytes, 0xA5, dtype=np.uint8)

    def by_one(self) -> planner.PlanCounts:
        facts = planner.read_lengths(
            q_indptr=0 if self.batch.one_query_each else self.q_indptr.ctypes.data,
            kv_indptr=self.kv_indptr.ctypes.data,
            keys=self.last.ctypes.data,
            num_requests=self.requests,
            page_size=PAGE,
            last_pages=True,
            out=self.lengths.ctypes.data,
        )
        assert facts.tokens == self.q_indptr[-1]
        start = self.lengths.ctypes.data
        return planner.plan(
            self.batch.shape,
            q_indptr=start,
            kv_indptr=start + 4 * (self.requests + 1),
            kv_len=start + 8 * (self.requests + 1),
            num_requests=self.requests,
            max_partial_rows=self.batch.max_partial_rows,
            max_merges=self.limits.merges,
            out=self.out.ctypes.data,
            out_bytes=self.limits.bytes,
        )

    def by_threads(self, shim: ctypes.CDLL, threads: int, **changes: int) -> None:
        shape, start = self.batch.shape, self.out.ctypes.data
        scratch = [
            np.zeros(int(shim.sizes(which)) * count, dtype=np.uint8)
            for which, count in ((0, self.requests + 1), (1, shape.num_workers), (2, shape.num_workers))
        ]
        fields: dict[str, int] = {
            **shape._asdict(),
            "q_indptr": 0 if self.batch.one_query_each else self.q_indptr.ctypes.data,
            "kv_indptr": self.kv_indptr.ctypes.data,
            "keys": self.last.ctypes.data,
            "lengths": self.lengths.ctypes.data,
            **{name: array.ctypes.data for name, array in zip(("before", "ends", "cuts"), scratch)},
            "worker_indptr": start,
            "num_merges": start + self.offsets.num_merges,
            "merges": start + self.offsets.merges,
            "arrivals": start + self.offsets.arrivals,
            "items": start + self.offsets.items,
            "max_items": (self.limits.bytes - self.offsets.items) // 48,
            "max_merges": self.limits.merges,
            "max_pieces": self.batch.max_partial_rows // shape.tile_rows,
            "num_requests": self.requests,
            "max_queries": 1 << 20,
            "max_tokens": 1 << 28,
            "page_size": PAGE,
            "last_pages": 1,
            **changes,
        }
        shim.plan_by(threads, ctypes.byref(PlanParams(**fields)))

    def used(self, counts: planner.PlanCounts) -> list[bytes]:
        """Return the bytes of the plan that mean something."""
        offsets = self.offsets
        return [
            self.out[: offsets.num_merges + 4].tobytes(),
            self.out[offsets.merges :][: 32 * counts.num_merges].tobytes(),
            self.out[offsets.arrivals :][: 4 * counts.num_merges].tobytes(),
            self.out[offsets.items : counts.used_bytes].tobytes(),
            self.lengths.tobytes(),
        ]

    def is_without_work(self) -> bool:
        indptr = self.out[: 4 * (self.batch.shape.num_workers + 1)].view(np.int32)
        return not indptr.any() and not self.out[self.offsets.num_merges :][:4].any()


@settings(max_examples=120, deadline=None)
@given(batch=batches(), threads=st.sampled_from([1, 2, 5, 16]))
def test_threads_make_the_plan_of_one(shim: ctypes.CDLL, batch: Batch, threads: int) -> None:
    one, many = Planned(batch), Planned(batch)
    many.by_threads(shim, threads)
    try:
        counts = one.by_one()
    except ValueError:  # fixed pieces beyond the partial rows: the host raises, a device does nothing
        assert many.is_without_work()
        return
    assert many.used(counts) == one.used(counts)


SHAPE = planner.Shape(4, 2, 16, 64, True, 8)
GOOD = Batch([(1, 300), (3, 40), (2, 5)], SHAPE, 1 << 30, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q_indptr", [0, 1, 0, 6]),
        ("q_indptr", [1, 1, 4, 6]),
        ("q_indptr", [0, 1, 4, 1 << 30]),
        ("kv_indptr", [0, 19, 18, 23]),
        ("kv_indptr", [-1, 18, 22, 23]),
        ("last", [0, 8, 5]),
        ("last", [12, 17, 5]),
    ],
)
def test_lengths_without_sense_make_a_plan_without_work(shim: ctypes.CDLL, name: str, value: list[int]) -> None:
    planned = Planned(GOOD)
    setattr(planned, name, ints(value))
    planned.by_threads(shim, 4)
    assert planned.is_without_work()


@pytest.mark.parametrize("name", ["max_items", "max_merges", "max_queries", "max_tokens"])
def test_what_is_beyond_its_maxima_makes_a_plan_without_work(shim: ctypes.CDLL, name: str) -> None:
    planned = Planned(GOOD)
    planned.by_threads(shim, 4, **{name: 1})
    assert planned.is_without_work()
    assert (planned.out[planned.offsets.items :] == 0xA5).all()
