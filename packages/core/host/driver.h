// The CUDA driver as a table of functions, found in libcuda.so.1 when first needed.
//
// Nothing here links or includes CUDA: the types below repeat the driver's stable binary interface, so one build of
// this extension serves machines with any driver and with none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace flashinfer::host {

using CudaResult = int;
using CudaDevice = int;
using CudaContext = struct CudaContextOpaque*;
using CudaModule = struct CudaModuleOpaque*;
using CudaFunctionHandle = struct CudaFunctionOpaque*;
using CudaStream = struct CudaStreamOpaque*;

// One wish about a launch. The driver's value is a union of 64 bytes; the one used here is a flag.
struct CudaLaunchAttribute {
  int id;
  int pad;
  union {
    int flag;
    uint64_t bytes[8];
  } value;
};
static_assert(sizeof(CudaLaunchAttribute) == 72, "CUlaunchAttribute is 72 bytes");

// Lets a kernel begin while the one before it on the stream still runs.
constexpr int kProgrammaticStreamSerialization = 6;

struct CudaLaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  CudaStream stream;
  const CudaLaunchAttribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(CudaLaunchConfig) == 56, "CUlaunchConfig is 56 bytes");

constexpr CudaResult kCudaSuccess = 0;
constexpr CudaResult kCudaNoDevice = 100;

enum class DeviceAttribute : int {
  kSmCount = 16,
  kL2Bytes = 38,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedOptinBytes = 97,
};

enum class FunctionAttribute : int {
  kSharedBytes = 1,
  kRegisters = 4,
  kMaxDynamicSharedBytes = 8,
  kPreferredSharedCarveout = 9,
};

// A call of the driver failed, or there is no driver.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// libcuda.so.1 is missing or too old to be used.
struct CudaUnavailable : CudaError {
  using CudaError::CudaError;
};

struct Driver {
  CudaResult (*init)(unsigned flags);
  CudaResult (*driver_version)(int* version);
  CudaResult (*error_name)(CudaResult result, const char** name);
  CudaResult (*error_string)(CudaResult result, const char** text);
  CudaResult (*device_count)(int* count);
  CudaResult (*device)(CudaDevice* device, int ordinal);
  CudaResult (*device_name)(char* name, int bytes, CudaDevice device);
  CudaResult (*device_attribute)(int* value, DeviceAttribute attribute, CudaDevice device);
  CudaResult (*device_memory)(size_t* bytes, CudaDevice device);
  CudaResult (*device_uuid)(unsigned char* uuid, CudaDevice device);
  CudaResult (*primary_context_retain)(CudaContext* context, CudaDevice device);
  CudaResult (*primary_context_release)(CudaDevice device);
  CudaResult (*context_current)(CudaContext* context);
  CudaResult (*context_push)(CudaContext context);
  CudaResult (*context_pop)(CudaContext* context);
  CudaResult (*exchange_capture_mode)(int* mode);
  CudaResult (*module_load)(CudaModule* module, const void* image, unsigned num_options, int* options, void** values);
  CudaResult (*module_unload)(CudaModule module);
  CudaResult (*module_function)(CudaFunctionHandle* function, CudaModule module, const char* name);
  CudaResult (*function_attribute)(int* value, FunctionAttribute attribute, CudaFunctionHandle function);
  CudaResult (*set_function_attribute)(CudaFunctionHandle function, FunctionAttribute attribute, int value);
  CudaResult (*occupancy)(int* blocks, CudaFunctionHandle function, int block_size, size_t dynamic_shared_bytes);
  CudaResult (*launch)(CudaFunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, CudaStream stream, void** params,
                       void** extra);
  // Null where the driver is too old.
  CudaResult (*launch_ex)(const CudaLaunchConfig* config, CudaFunctionHandle function, void** params, void** extra);
  CudaResult (*function_load)(CudaFunctionHandle function);
  CudaResult (*parameter_info)(CudaFunctionHandle function, size_t index, size_t* offset, size_t* bytes);

  // Throws CudaError with the operation, the error's name and its text, unless `result` is success.
  void check(CudaResult result, const char* operation) const;
  void check(CudaResult result, const char* operation, const std::string& details) const;
};

// The table, filled once for the process. Throws CudaUnavailable; a later call tries again.
const Driver& driver();

// The table after cuInit has succeeded.
const Driver& initialised_driver();

}  // namespace flashinfer::host
