#include "driver.h"

#include <dlfcn.h>

#include <memory>

namespace flashinfer::host {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

struct Close {
  void operator()(void* library) const { dlclose(library); }
};
using Library = std::unique_ptr<void, Close>;

template <typename Function>
void find(Function*& function, const Library& library, const char* name) {
  function = reinterpret_cast<Function*>(dlsym(library.get(), name));
}

template <typename Function>
void require(Function*& function, const Library& library, const char* name) {
  find(function, library, name);
  if (function == nullptr) throw CudaUnavailable(std::string(kLibrary) + " has no function " + name);
}

Library open_library() {
  Library library(dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL));
  if (library == nullptr) {
    const char* why = dlerror();
    throw CudaUnavailable(std::string("the CUDA driver could not be loaded: ") + (why ? why : kLibrary));
  }
  return library;
}

Driver load() {
  Library library = open_library();
  Driver d = {};
  require(d.init, library, "cuInit");
  require(d.driver_version, library, "cuDriverGetVersion");
  require(d.error_name, library, "cuGetErrorName");
  require(d.error_string, library, "cuGetErrorString");
  require(d.device_count, library, "cuDeviceGetCount");
  require(d.device, library, "cuDeviceGet");
  require(d.device_name, library, "cuDeviceGetName");
  require(d.device_attribute, library, "cuDeviceGetAttribute");
  require(d.device_memory, library, "cuDeviceTotalMem_v2");
  require(d.device_uuid, library, "cuDeviceGetUuid");
  require(d.primary_context_retain, library, "cuDevicePrimaryCtxRetain");
  require(d.primary_context_release, library, "cuDevicePrimaryCtxRelease_v2");
  require(d.context_current, library, "cuCtxGetCurrent");
  require(d.context_push, library, "cuCtxPushCurrent_v2");
  require(d.context_pop, library, "cuCtxPopCurrent_v2");
  require(d.exchange_capture_mode, library, "cuThreadExchangeStreamCaptureMode");
  require(d.module_load, library, "cuModuleLoadDataEx");
  require(d.module_unload, library, "cuModuleUnload");
  require(d.module_function, library, "cuModuleGetFunction");
  require(d.function_attribute, library, "cuFuncGetAttribute");
  require(d.set_function_attribute, library, "cuFuncSetAttribute");
  require(d.occupancy, library, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  require(d.launch, library, "cuLaunchKernel");
  find(d.launch_ex, library, "cuLaunchKernelEx");
  find(d.function_load, library, "cuFuncLoad");
  find(d.parameter_info, library, "cuFuncGetParamInfo");
  library.release();  // stays open: the table points into it
  return d;
}

}  // namespace

void Driver::check(CudaResult result, const char* operation) const { check(result, operation, ""); }

void Driver::check(CudaResult result, const char* operation, const std::string& details) const {
  if (result == kCudaSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  error_name(result, &name);
  error_string(result, &text);
  throw CudaError(std::string(operation) + " failed: " + (name ? name : "unknown CUDA error") + " (" +
                  std::to_string(result) + "): " + (text ? text : "no description") +
                  (details.empty() ? "" : "\n" + details));
}

const Driver& driver() {
  static const Driver table = load();
  return table;
}

const Driver& initialised_driver() {
  const Driver& d = driver();
  d.check(d.init(0), "cuInit");
  return d;
}

}  // namespace flashinfer::host
