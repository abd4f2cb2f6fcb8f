#include "bindings.h"
#include "lengths.h"
#include "planner.h"

namespace flashinfer::host {
namespace {

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::tuple plan_tuple(const PlanShape& shape, uintptr_t q_indptr, uintptr_t kv_indptr, uintptr_t kv_len,
                     int32_t num_requests, int64_t max_partial_rows, int64_t max_merges, uintptr_t out,
                     int64_t out_bytes) {
  const PlanLengths lengths = {pointer<const int32_t>(q_indptr), pointer<const int32_t>(kv_indptr),
                               pointer<const int32_t>(kv_len), num_requests};
  PlanResult result;
  {
    py::gil_scoped_release release;
    result = plan(shape, lengths, max_partial_rows, max_merges, pointer<void>(out), out_bytes);
  }
  return py::make_tuple(result.counts.items, result.counts.merges, result.partial_rows, result.used_bytes);
}

int64_t rows_needed(const PlanShape& shape, uintptr_t q_indptr, uintptr_t kv_indptr, uintptr_t kv_len,
                    int32_t num_requests) {
  return fixed_rows(shape, {pointer<const int32_t>(q_indptr), pointer<const int32_t>(kv_indptr),
                            pointer<const int32_t>(kv_len), num_requests});
}

py::tuple read_tuple(uintptr_t q_indptr, uintptr_t kv_indptr, uintptr_t keys, int32_t num_requests, int32_t page_size,
                     bool last_pages, uintptr_t out) {
  const LengthsSource source = {pointer<const int32_t>(q_indptr),
                                pointer<const int32_t>(kv_indptr),
                                pointer<const int32_t>(keys),
                                num_requests,
                                page_size,
                                last_pages};
  const LengthsFacts facts = read_lengths(source, pointer<int32_t>(out));
  return py::make_tuple(facts.tokens, facts.longest, facts.entries);
}

py::tuple offsets_tuple(int64_t num_workers, int64_t max_merges) {
  const PlanOffsets offsets = plan_offsets(num_workers, max_merges);
  return py::make_tuple(offsets.num_merges, offsets.merges, offsets.arrivals, offsets.items);
}

py::tuple limits_tuple(const PlanShape& shape, int64_t total_q, int64_t num_requests) {
  const PlanLimits limits = plan_limits(shape, total_q, num_requests);
  return py::make_tuple(limits.merges, limits.bytes);
}

py::tuple uniform_tuple(const PlanShape& shape, int32_t q_len, int32_t kv_len, int64_t max_partial_rows) {
  const UniformResult result = uniform_plan(shape, q_len, kv_len, max_partial_rows);
  return py::make_tuple(result.work.tiles, result.work.pieces, result.work.piece_len, result.num_items,
                        result.partial_rows);
}

}  // namespace

void bind_planner(py::module_& m) {
  using namespace py::literals;
  py::register_exception<BufferTooSmall>(m, "BufferTooSmallError", PyExc_ValueError);
  py::register_exception<PartialTooSmall>(m, "PartialTooSmallError", PyExc_ValueError);
  py::class_<PlanShape>(m, "PlanShape")
      .def(py::init([](int32_t group, int32_t kv_heads, int32_t tile_rows, int32_t kv_tile, bool causal,
                       int32_t num_workers, int32_t window_left, int32_t fixed_piece) {
             return PlanShape{group, kv_heads, tile_rows, kv_tile, causal, window_left, num_workers, fixed_piece};
           }),
           "group"_a, "kv_heads"_a, "tile_rows"_a, "kv_tile"_a, "causal"_a, "num_workers"_a, "window_left"_a,
           "fixed_piece"_a);
  m.def("plan", &plan_tuple, "shape"_a, "q_indptr"_a, "kv_indptr"_a, "kv_len"_a, "num_requests"_a, "max_partial_rows"_a,
        "max_merges"_a, "out"_a, "out_bytes"_a,
        "Write the plan of a batch to `out`; return (num_items, num_merges, partial_rows, used_bytes).");
  m.def("fixed_rows", &rows_needed, "shape"_a, "q_indptr"_a, "kv_indptr"_a, "kv_len"_a, "num_requests"_a,
        "Return the rows of the partial buffers that pieces of fixed length need.");
  m.def("most_fixed_rows", &most_fixed_rows, "shape"_a, "max_q_len"_a, "max_kv_len"_a,
        "Return what fixed_rows gives at most for one request of these maxima.");
  m.def("read_lengths", &read_tuple, "q_indptr"_a, "kv_indptr"_a, "keys"_a, "num_requests"_a, "page_size"_a,
        "last_pages"_a, "out"_a,
        "Check lengths, write q_indptr, kv_indptr and kv_len to `out`; return (tokens, longest, entries).");
  m.def("plan_offsets", &offsets_tuple, "num_workers"_a, "max_merges"_a,
        "Return the byte offsets (num_merges, merges, arrivals, items) in a plan's buffer.");
  m.def("plan_limits", &limits_tuple, "shape"_a, "total_q"_a, "num_requests"_a,
        "Return (merges, bytes) that no plan within these maxima exceeds.");
  m.def("uniform_plan", &uniform_tuple, "shape"_a, "q_len"_a, "kv_len"_a, "max_partial_rows"_a,
        "Return (tiles, pieces, piece_len, num_items, partial_rows) of one request split evenly.");
}

}  // namespace flashinfer::host
