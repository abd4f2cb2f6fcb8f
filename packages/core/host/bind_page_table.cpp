#include "bindings.h"
#include "page_table.h"

namespace flashinfer::host {
namespace {

namespace py = pybind11;

const int32_t* ints(uintptr_t address) { return reinterpret_cast<const int32_t*>(address); }

py::object bad_page(uintptr_t pages, int64_t entries, uintptr_t indptr, int32_t requests, int32_t page_size,
                    int64_t num_pages, uintptr_t q_indptr, uintptr_t kv_len, int32_t window_left) {
  const auto bad = find_bad_page({ints(pages), ints(indptr), requests, entries, page_size, num_pages},
                                 {ints(q_indptr), ints(kv_len), window_left});
  if (!bad) return py::none();
  return py::make_tuple(bad->request, bad->index, bad->page);
}

py::object bad_append(uintptr_t pages, int64_t entries, uintptr_t indptr, int32_t requests, int32_t page_size,
                      int64_t num_pages, uintptr_t batch_indices, uintptr_t positions, int64_t tokens, bool strict) {
  const auto bad = find_bad_append({ints(pages), ints(indptr), requests, entries, page_size, num_pages},
                                   ints(batch_indices), ints(positions), tokens, strict);
  if (!bad) return py::none();
  constexpr const char* kKinds[] = {"request", "position", "entry", "page"};
  return py::make_tuple(kKinds[static_cast<int>(bad->kind)], bad->token, bad->request, bad->position, bad->value);
}

}  // namespace

void bind_page_table(py::module_& m) {
  using namespace py::literals;
  m.def("bad_page", &bad_page, "pages"_a, "entries"_a, "indptr"_a, "requests"_a, "page_size"_a, "num_pages"_a,
        "q_indptr"_a, "kv_len"_a, "window_left"_a,
        "Return (request, index, page) of the first entry that attention uses and the cache has no page for, or None.");
  m.def("bad_append", &bad_append, "pages"_a, "entries"_a, "indptr"_a, "requests"_a, "page_size"_a, "num_pages"_a,
        "batch_indices"_a, "positions"_a, "tokens"_a, "strict"_a,
        "Return (kind, token, request, position, value) of the first token that append cannot write, or None.");
}

}  // namespace flashinfer::host
