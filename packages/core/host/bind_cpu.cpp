#include <stdexcept>
#include <string_view>

#include "bindings.h"
#include "cpu_function.h"

namespace flashinfer::host {
namespace {

namespace py = pybind11;

std::unique_ptr<CpuFunction> cpu_load(const py::bytes& payload) {
  const std::string_view bytes = payload;
  py::gil_scoped_release release;
  return std::make_unique<CpuFunction>(bytes.data(), bytes.size());
}

void launch(const CpuFunction& function, const py::object& params, int32_t workers, int32_t threads) {
  if (workers < 0) throw std::invalid_argument("workers must not be negative, got " + std::to_string(workers));
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  const ParamsView view(params);
  py::gil_scoped_release release;
  execute(function.entry(), view.data(), workers, threads);
}

}  // namespace

void bind_cpu(py::module_& m) {
  using namespace py::literals;
  py::class_<CpuFunction>(m, "CpuFunction", "One kernel of a CPU image.")
      .def("launch", &launch, "params"_a, "workers"_a, "threads"_a,
           "Run workers 0..workers-1 on up to `threads` threads; return when all are done.");
  m.def("cpu_load", &cpu_load, "payload"_a, "Load a CPU image, a shared object with the symbol flashinfer_entry.");
  m.def("pool_threads", &pool_threads, "Return the number of threads that this process' executor has started.");
}

}  // namespace flashinfer::host
