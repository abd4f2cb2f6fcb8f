#include "bindings.h"
#include "planner.h"

namespace flashinfer::host {
namespace {

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::tuple plan_tuple(uintptr_t q_indptr, uintptr_t kv_indptr, uintptr_t kv_len, int32_t num_requests, int32_t group,
                     int32_t kv_heads, int32_t tile_rows, int32_t kv_tile, bool causal, int32_t window_left,
                     int32_t num_workers, int64_t max_partial_rows, uintptr_t out, int64_t out_bytes) {
  const PlanShape shape = {group, kv_heads, tile_rows, kv_tile, causal, window_left, num_workers};
  const PlanLengths lengths = {pointer<const int32_t>(q_indptr), pointer<const int32_t>(kv_indptr),
                               pointer<const int32_t>(kv_len), num_requests};
  PlanResult result;
  {
    py::gil_scoped_release release;
    result = plan(shape, lengths, max_partial_rows, pointer<void>(out), out_bytes);
  }
  return py::make_tuple(result.counts.items, result.counts.merges, result.partial_rows, result.used_bytes);
}

py::tuple offsets_tuple(int64_t num_workers) {
  const PlanOffsets offsets = plan_offsets(num_workers);
  return py::make_tuple(offsets.num_merges, offsets.merges, offsets.arrivals, offsets.items);
}

py::tuple uniform_tuple(int32_t q_len, int32_t kv_len, int32_t group, int32_t kv_heads, int32_t tile_rows,
                        int32_t kv_tile, bool causal, int32_t window_left, int32_t num_workers,
                        int64_t max_partial_rows) {
  const PlanShape shape = {group, kv_heads, tile_rows, kv_tile, causal, window_left, num_workers};
  const UniformResult result = uniform_plan(shape, q_len, kv_len, max_partial_rows);
  return py::make_tuple(result.work.tiles, result.work.pieces, result.work.piece_len, result.num_items,
                        result.partial_rows);
}

}  // namespace

void bind_planner(py::module_& m) {
  using namespace py::literals;
  py::register_exception<BufferTooSmall>(m, "BufferTooSmallError", PyExc_ValueError);
  m.def("plan", &plan_tuple, "q_indptr"_a, "kv_indptr"_a, "kv_len"_a, "num_requests"_a, "group"_a, "kv_heads"_a,
        "tile_rows"_a, "kv_tile"_a, "causal"_a, "window_left"_a, "num_workers"_a, "max_partial_rows"_a, "out"_a,
        "out_bytes"_a, "Write the plan of a batch to `out`; return (num_items, num_merges, partial_rows, used_bytes).");
  m.def("plan_offsets", &offsets_tuple, "num_workers"_a,
        "Return the byte offsets (num_merges, merges, arrivals, items) in a plan's buffer.");
  m.def("plan_bytes", &plan_bytes, "total_q"_a, "num_requests"_a, "group"_a, "kv_heads"_a, "tile_rows"_a,
        "num_workers"_a, "Return the bytes that no plan within these maxima exceeds.");
  m.def("uniform_plan", &uniform_tuple, "q_len"_a, "kv_len"_a, "group"_a, "kv_heads"_a, "tile_rows"_a, "kv_tile"_a,
        "causal"_a, "window_left"_a, "num_workers"_a, "max_partial_rows"_a,
        "Return (tiles, pieces, piece_len, num_items, partial_rows) of one request split evenly.");
}

}  // namespace flashinfer::host
