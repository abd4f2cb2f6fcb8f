// What the parts of flashinfer_core._host share, and the functions that add each part to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace flashinfer::host {

void bind_planner(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_page_table(pybind11::module_& m);
void bind_launch(pybind11::module_& m);

// The bytes of a parameter struct, held for the time of a launch.
class ParamsView {
 public:
  explicit ParamsView(const pybind11::object& params) {
    if (PyObject_GetBuffer(params.ptr(), &view_, PyBUF_SIMPLE) != 0) throw pybind11::error_already_set();
  }
  ParamsView(const ParamsView&) = delete;
  ParamsView& operator=(const ParamsView&) = delete;
  ~ParamsView() { PyBuffer_Release(&view_); }

  void* data() const { return view_.buf; }
  size_t bytes() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

}  // namespace flashinfer::host
