// The Python module flashinfer_core._host. Tensors cross as addresses, parameter structs as buffers.
#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Driver, CPU executor, planner, page tables: the C++ of flashinfer_core, whose typed front is Python.";
  flashinfer::host::bind_planner(m);
  flashinfer::host::bind_cpu(m);
  flashinfer::host::bind_cuda(m);
  flashinfer::host::bind_page_table(m);
  flashinfer::host::bind_launch(m);
}
