#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda_function.h"

namespace flashinfer::host {
namespace {

namespace py = pybind11;

int version() {
  const Driver& d = driver();
  int number = 0;
  d.check(d.driver_version(&number), "cuDriverGetVersion");
  return number;
}

// As nvidia-smi prints it, without its "GPU-".
std::string uuid_text(const unsigned char (&uuid)[16]) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[uuid[i] >> 4];
    text += kDigits[uuid[i] & 15];
  }
  return text;
}

py::dict facts_dict(int device) {
  using namespace py::literals;
  DeviceFacts facts;
  {
    py::gil_scoped_release release;
    facts = device_facts(device);
  }
  return py::dict(
      "name"_a = facts.name, "capability"_a = py::make_tuple(facts.capability_major, facts.capability_minor),
      "sm_count"_a = facts.sm_count, "shared_optin_bytes"_a = facts.shared_optin_bytes,
      "total_memory"_a = facts.total_memory, "l2_bytes"_a = facts.l2_bytes, "uuid"_a = uuid_text(facts.uuid));
}

std::unique_ptr<CudaFunction> cuda_load(const py::bytes& payload, const std::string& entry, int device, int threads,
                                        int shared_bytes) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  if (shared_bytes < 0) {
    throw std::invalid_argument("shared_bytes must not be negative, got " + std::to_string(shared_bytes));
  }
  const char* image = PyBytes_AS_STRING(payload.ptr());  // Python ends it with the zero byte that PTX needs
  py::gil_scoped_release release;
  return std::make_unique<CudaFunction>(image, entry.c_str(), device, threads, shared_bytes);
}

void launch(const CudaFunction& function, const py::object& params, int32_t workers, uintptr_t stream,
            bool programmatic) {
  if (workers < 1) throw std::invalid_argument("workers must be at least 1, got " + std::to_string(workers));
  const ParamsView view(params);
  if (function.params_bytes() != 0 && function.params_bytes() != view.bytes()) {
    throw std::invalid_argument("the kernel takes " + std::to_string(function.params_bytes()) +
                                " bytes of parameters, got " + std::to_string(view.bytes()));
  }
  // A full queue makes the driver wait, perhaps for a host callback that needs the interpreter.
  py::gil_scoped_release release;
  function.launch(view.data(), static_cast<uint32_t>(workers), stream, programmatic);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using namespace py::literals;
  const auto& error = py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  py::register_exception<CudaUnavailable>(m, "CudaUnavailableError", error);
  py::class_<CudaFunction>(m, "CudaFunction", "One kernel of a CUDA image, loaded for one device.")
      .def(
          "launch", &launch, "params"_a, "workers"_a, "stream"_a = 0, "programmatic"_a = false,
          "Queue `workers` CTAs on the raw `stream`; `params` is copied. `programmatic`: begin while the kernel before "
          "still runs, for kernels that wait for it themselves.")
      .def_property_readonly("registers", &CudaFunction::registers)
      .def_property_readonly("shared_bytes", &CudaFunction::shared_bytes)
      .def_property_readonly("max_workers", &CudaFunction::max_workers);
  m.def("cuda_load", &cuda_load, "payload"_a, "entry"_a, "device"_a, "threads"_a, "shared_bytes"_a,
        "Load a cubin or PTX and its kernel `entry`, also while a stream is being captured.");
  m.def("driver_version", &version, "Return the CUDA version of the driver, 12040 for 12.4.");
  m.def("device_count", &device_count, py::call_guard<py::gil_scoped_release>(), "Return the number of GPUs.");
  m.def("device_facts", &facts_dict, "device"_a, "Return what the driver knows of a GPU.");
}

}  // namespace flashinfer::host
