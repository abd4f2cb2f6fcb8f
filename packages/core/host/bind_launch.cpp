#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "bound_launch.h"

namespace flashinfer::host {
namespace {

namespace py = pybind11;

constexpr size_t kAlignment = 16;  // of each step's parameters

// Keeps the functions alive that its steps point to.
struct Bound {
  py::list functions;
  BoundLaunch launch;
};

BoundLaunch::Step step_of(const py::tuple& step, std::vector<unsigned char>& params) {
  const py::object function = step[0];
  const ParamsView view(step[1]);
  const auto workers = step[2].cast<int32_t>();
  if (workers < 1) throw std::invalid_argument("workers must be at least 1, got " + std::to_string(workers));
  const size_t offset = (params.size() + kAlignment - 1) / kAlignment * kAlignment;
  params.resize(offset + view.bytes());
  std::memcpy(params.data() + offset, view.data(), view.bytes());
  BoundLaunch::Step bound = {nullptr, nullptr, offset, static_cast<uint32_t>(workers), step[3].cast<bool>()};
  if (py::isinstance<CpuFunction>(function)) {
    bound.cpu = function.cast<const CpuFunction*>();
    return bound;
  }
  bound.cuda = function.cast<const CudaFunction*>();
  if (bound.cuda->params_bytes() != 0 && bound.cuda->params_bytes() != view.bytes()) {
    throw std::invalid_argument("the kernel takes " + std::to_string(bound.cuda->params_bytes()) +
                                " bytes of parameters, got " + std::to_string(view.bytes()));
  }
  return bound;
}

// steps: (function, params, workers, programmatic); slots: for each address, pairs of a step and a byte offset in it.
std::unique_ptr<Bound> bind(const py::sequence& steps, const py::sequence& slots) {
  py::list functions;
  std::vector<BoundLaunch::Step> bound;
  std::vector<unsigned char> params;
  for (const py::handle step : steps) {
    const auto fields = step.cast<py::tuple>();
    functions.append(fields[0]);
    bound.push_back(step_of(fields, params));
  }
  std::vector<std::vector<size_t>> offsets;
  for (const py::handle slot : slots) {
    offsets.emplace_back();
    for (const py::handle place : slot) {
      const auto pair = place.cast<py::tuple>();
      offsets.back().push_back(bound.at(pair[0].cast<size_t>()).params + pair[1].cast<size_t>());
    }
  }
  BoundLaunch launch(std::move(bound), std::move(params), std::move(offsets));
  return std::make_unique<Bound>(Bound{std::move(functions), std::move(launch)});
}

void launch(const Bound& bound, const py::tuple& addresses, uintptr_t where) {
  constexpr size_t kMaxSlots = BoundLaunch::kMaxBytes / sizeof(uint64_t);
  uint64_t values[kMaxSlots];
  const size_t count = bound.launch.num_slots();
  if (addresses.size() != count || count > kMaxSlots) {
    throw std::invalid_argument("the launch takes " + std::to_string(count) + " addresses, got " +
                                std::to_string(addresses.size()));
  }
  for (size_t i = 0; i < count; ++i) {
    values[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i)));
    if (values[i] == static_cast<uint64_t>(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  py::gil_scoped_release release;
  bound.launch.launch(values, where);
}

}  // namespace

void bind_launch(py::module_& m) {
  using namespace py::literals;
  py::class_<Bound>(m, "BoundLaunch", "Kernels in a row with parameters that lack only addresses.")
      .def("launch", &launch, "addresses"_a, "where"_a,
           "Launch all with these addresses: on the raw stream `where`, or on `where` threads of a CPU.");
  m.def("bind", &bind, "steps"_a, "slots"_a,
        "Bind steps (function, params, workers, programmatic); slots: for each address, pairs (step, byte offset).");
}

}  // namespace flashinfer::host
