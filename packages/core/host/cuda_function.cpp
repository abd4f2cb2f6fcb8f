#include "cuda_function.h"

#include <string>

namespace flashinfer::host {
namespace {

constexpr int kDefaultSharedBytes = 48 << 10;  // what any kernel may use without asking
constexpr int kCarveoutMaxShared = 100;
constexpr int kCaptureModeRelaxed = 2;
constexpr int kJitErrorLog = 5;
constexpr int kJitErrorLogBytes = 6;

// A device's primary context, the one that torch uses. Released only if loading fails.
class PrimaryContext {
 public:
  PrimaryContext(const Driver& d, CudaDevice device) : driver_(d), device_(device) {
    d.check(d.primary_context_retain(&context_, device), "cuDevicePrimaryCtxRetain");
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  ~PrimaryContext() {
    if (context_ != nullptr) driver_.primary_context_release(device_);
  }

  CudaContext get() const { return context_; }
  CudaContext keep() {
    const CudaContext context = context_;
    context_ = nullptr;
    return context;
  }

 private:
  const Driver& driver_;
  CudaDevice device_;
  CudaContext context_ = nullptr;
};

// Makes a context this thread's current one for a scope; free where it already is, as under torch.
class CurrentContext {
 public:
  CurrentContext(const Driver& d, CudaContext context) : driver_(d) {
    CudaContext current = nullptr;
    d.check(d.context_current(&current), "cuCtxGetCurrent");
    if (current == context) return;
    d.check(d.context_push(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext() {
    CudaContext popped;
    if (pushed_) driver_.context_pop(&popped);
  }

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// Lets this thread load modules while a stream is being captured: neither belongs to the capture.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& d) : driver_(d) {
    d.check(d.exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { driver_.exchange_capture_mode(&mode_); }

 private:
  const Driver& driver_;
  int mode_ = kCaptureModeRelaxed;  // and then the one to restore
};

// A loaded module, unloaded only if what follows fails.
class Module {
 public:
  Module(const Driver& d, const char* image) : driver_(d) {
    char log[4096] = "";
    int options[] = {kJitErrorLog, kJitErrorLogBytes};
    void* values[] = {log, reinterpret_cast<void*>(sizeof(log))};
    const CudaResult result = d.module_load(&module_, image, 2, options, values);
    log[sizeof(log) - 1] = '\0';
    d.check(result, "cuModuleLoadData", log);
  }
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  ~Module() {
    if (module_ != nullptr) driver_.module_unload(module_);
  }

  CudaModule get() const { return module_; }
  void keep() { module_ = nullptr; }

 private:
  const Driver& driver_;
  CudaModule module_ = nullptr;
};

CudaDevice device_at(const Driver& d, int ordinal) {
  CudaDevice device = 0;
  d.check(d.device(&device, ordinal), "cuDeviceGet", "asked for device " + std::to_string(ordinal));
  return device;
}

int attribute(const Driver& d, DeviceAttribute which, CudaDevice device) {
  int value = 0;
  d.check(d.device_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

int attribute(const Driver& d, FunctionAttribute which, CudaFunctionHandle function) {
  int value = 0;
  d.check(d.function_attribute(&value, which, function), "cuFuncGetAttribute");
  return value;
}

}  // namespace

int device_count() {
  const Driver& d = driver();
  const CudaResult started = d.init(0);
  if (started == kCudaNoDevice) return 0;
  d.check(started, "cuInit");
  int count = 0;
  d.check(d.device_count(&count), "cuDeviceGetCount");
  return count;
}

DeviceFacts device_facts(int ordinal) {
  const Driver& d = initialised_driver();
  const CudaDevice device = device_at(d, ordinal);
  DeviceFacts facts = {};
  d.check(d.device_name(facts.name, sizeof(facts.name) - 1, device), "cuDeviceGetName");
  facts.capability_major = attribute(d, DeviceAttribute::kCapabilityMajor, device);
  facts.capability_minor = attribute(d, DeviceAttribute::kCapabilityMinor, device);
  facts.sm_count = attribute(d, DeviceAttribute::kSmCount, device);
  facts.shared_optin_bytes = attribute(d, DeviceAttribute::kSharedOptinBytes, device);
  facts.l2_bytes = attribute(d, DeviceAttribute::kL2Bytes, device);
  d.check(d.device_memory(&facts.total_memory, device), "cuDeviceTotalMem");
  d.check(d.device_uuid(facts.uuid, device), "cuDeviceGetUuid");
  return facts;
}

CudaFunction::CudaFunction(const char* image, const char* entry, int device_ordinal, int threads, int shared_bytes)
    : threads_(threads), dynamic_shared_bytes_(shared_bytes) {
  const Driver& d = initialised_driver();
  const CudaDevice device = device_at(d, device_ordinal);
  const RelaxedCapture relaxed(d);
  PrimaryContext context(d, device);
  const CurrentContext current(d, context.get());
  Module module(d, image);
  d.check(d.module_function(&function_, module.get(), entry), "cuModuleGetFunction",
          std::string("asked for kernel ") + entry);
  set_shared_bytes(d);
  // Under lazy loading the code would come with the first launch, which may be inside a capture.
  if (d.function_load != nullptr) d.check(d.function_load(function_), "cuFuncLoad");
  read_attributes(d, device);
  module.keep();
  context_ = context.keep();
}

void CudaFunction::set_shared_bytes(const Driver& d) const {
  if (dynamic_shared_bytes_ == 0) return;
  if (dynamic_shared_bytes_ > kDefaultSharedBytes) {
    d.check(d.set_function_attribute(function_, FunctionAttribute::kMaxDynamicSharedBytes, dynamic_shared_bytes_),
            "cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)",
            "asked for " + std::to_string(dynamic_shared_bytes_) + " bytes of shared memory");
  }
  d.check(d.set_function_attribute(function_, FunctionAttribute::kPreferredSharedCarveout, kCarveoutMaxShared),
          "cuFuncSetAttribute(PREFERRED_SHARED_MEMORY_CARVEOUT)");
}

void CudaFunction::read_attributes(const Driver& d, CudaDevice device) {
  registers_ = attribute(d, FunctionAttribute::kRegisters, function_);
  static_shared_bytes_ = attribute(d, FunctionAttribute::kSharedBytes, function_);
  int per_sm = 0;
  d.check(d.occupancy(&per_sm, function_, threads_, static_cast<size_t>(dynamic_shared_bytes_)),
          "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (per_sm < 1) {
    throw CudaError("the kernel does not fit on the device: " + std::to_string(threads_) + " threads of " +
                    std::to_string(registers_) + " registers with " + std::to_string(shared_bytes()) +
                    " bytes of shared memory");
  }
  max_workers_ = per_sm * attribute(d, DeviceAttribute::kSmCount, device);
  size_t offset = 0;
  if (d.parameter_info != nullptr) {
    d.check(d.parameter_info(function_, 0, &offset, &params_bytes_), "cuFuncGetParamInfo");
  }
}

void CudaFunction::launch(void* params, uint32_t workers, uintptr_t stream, bool programmatic) const {
  const Driver& d = driver();
  const CurrentContext current(d, context_);
  const auto threads = static_cast<unsigned>(threads_);
  const auto shared_bytes = static_cast<unsigned>(dynamic_shared_bytes_);
  const auto queue = reinterpret_cast<CudaStream>(stream);
  void* arguments[] = {params};
  if (d.launch_ex != nullptr) {
    const CudaLaunchAttribute attributes[] = {{kProgrammaticStreamSerialization, 0, {1}}};
    const unsigned num_attributes = programmatic ? 1 : 0;
    const CudaLaunchConfig config = {{workers, 1, 1}, {threads, 1, 1}, shared_bytes, queue, attributes, num_attributes};
    d.check(d.launch_ex(&config, function_, arguments, nullptr), "cuLaunchKernelEx");
  } else {
    d.check(d.launch(function_, workers, 1, 1, threads, 1, 1, shared_bytes, queue, arguments, nullptr),
            "cuLaunchKernel");
  }
}

}  // namespace flashinfer::host
