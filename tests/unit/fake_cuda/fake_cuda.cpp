// A driver without a GPU: one device, one module, one kernel of one 16-byte parameter. Appends a line for each call to
// $FAKE_CUDA_LOG. The call named $FAKE_CUDA_FAIL returns $FAKE_CUDA_ERROR. OLD_DRIVER leaves out what 11.4 did not
// have.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kContext = 0x100, kModule = 0x200, kFunction = 0x300;
thread_local void* stack[8];  // of current contexts; the bottom one is none
thread_local int depth = 0;
thread_local int capture_mode = 0;

void* handle(int number) { return reinterpret_cast<void*>(static_cast<intptr_t>(number)); }
int number(void* h) { return static_cast<int>(reinterpret_cast<intptr_t>(h)); }

int called(const char* name, const char* format = "", ...) {
  if (FILE* log = std::fopen(std::getenv("FAKE_CUDA_LOG"), "a")) {
    std::fprintf(log, "%s", name);
    va_list values;
    va_start(values, format);
    std::vfprintf(log, format, values);
    va_end(values);
    std::fprintf(log, "\n");
    std::fclose(log);
  }
  const char* failing = std::getenv("FAKE_CUDA_FAIL");
  return failing && std::strcmp(failing, name) == 0 ? std::atoi(std::getenv("FAKE_CUDA_ERROR")) : 0;
}

template <typename T>
int give(int result, T* to, T value) {
  if (result == 0) *to = value;
  return result;
}

}  // namespace

struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int flag;
  } value;
};

struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned num_attributes;
};

#pragma GCC visibility push(default)
extern "C" {

int cuInit(unsigned) { return called("cuInit"); }
int cuDriverGetVersion(int* v) { return give(called("cuDriverGetVersion"), v, 12040); }
int cuGetErrorName(int error, const char** name) {
  *name = error == 218 ? "CUDA_ERROR_INVALID_PTX" : error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : nullptr;
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 218 ? "a PTX JIT compilation failed" : error == 701 ? "too many resources requested" : nullptr;
  return 0;
}
int cuDeviceGetCount(int* count) { return give(called("cuDeviceGetCount"), count, 1); }
int cuDeviceGet(int* device, int ordinal) {
  const int result = called("cuDeviceGet", " %d", ordinal);
  return give(result ? result : ordinal == 0 ? 0 : 101, device, 0);
}
int cuDeviceGetName(char* name, int bytes, int) {
  std::snprintf(name, bytes, "Fake H100");
  return called("cuDeviceGetName");
}
int cuDeviceGetAttribute(int* value, int which, int) {
  const int result = which == 16 ? 132 : which == 38 ? 50 << 20 : which == 75 ? 9 : which == 97 ? 227 << 10 : 0;
  return give(called("cuDeviceGetAttribute", " %d", which), value, result);
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return give(called("cuDeviceTotalMem"), bytes, size_t(80) << 30); }
int cuDeviceGetUuid(unsigned char* uuid, int) {
  for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(17 * i);
  return called("cuDeviceGetUuid");
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  return give(called("cuDevicePrimaryCtxRetain"), context, handle(kContext));
}
int cuDevicePrimaryCtxRelease_v2(int) { return called("cuDevicePrimaryCtxRelease"); }
int cuCtxGetCurrent(void** context) { return give(called("cuCtxGetCurrent"), context, stack[depth]); }
int cuCtxPushCurrent_v2(void* context) {
  const int result = called("cuCtxPushCurrent", " %x", number(context));
  if (result == 0) stack[++depth] = context;
  return result;
}
int cuCtxPopCurrent_v2(void** context) { return give(called("cuCtxPopCurrent"), context, stack[depth--]); }
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  return give(called("cuThreadExchangeStreamCaptureMode", " %d", *mode), mode, before);
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void** values) {
  const int result = called("cuModuleLoadDataEx", " %s", static_cast<const char*>(image));
  if (result) std::strcpy(static_cast<char*>(values[0]), "ptxas: line 3; syntax error");
  return give(result, module, handle(kModule));
}
int cuModuleUnload(void*) { return called("cuModuleUnload"); }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return give(called("cuModuleGetFunction", " %x %s", number(module), name), function, handle(kFunction));
}
int cuFuncGetAttribute(int* value, int which, void*) {
  return give(called("cuFuncGetAttribute", " %d", which), value, which == 1 ? 1024 : which == 3 ? 8 : 96);
}
int cuFuncSetAttribute(void*, int which, int value) { return called("cuFuncSetAttribute", " %d %d", which, value); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared_bytes) {
  return give(called("cuOccupancy", " %d %zu", threads, shared_bytes), blocks, threads > 1024 ? 0 : 2);
}
int cuLaunchKernel(void* function, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned shared_bytes, void* stream, void** params, void**) {
  return called("cuLaunchKernel", " %x grid %u block %u shared %u stream %x params %lx", number(function), x, threads,
                shared_bytes, number(stream), *static_cast<unsigned long*>(params[0]));
}
#ifndef OLD_DRIVER
int cuFuncLoad(void*) { return called("cuFuncLoad"); }
int cuFuncGetParamInfo(void*, size_t index, size_t* offset, size_t* bytes) {
  *offset = 0;
  return give(called("cuFuncGetParamInfo", " %zu", index), bytes, size_t(16));
}
int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** params, void**) {
  char attributes[100] = "none";
  int length = 0;
  for (unsigned i = 0; i < c->num_attributes; ++i) {
    const LaunchAttribute& one = c->attributes[i];
    length += std::snprintf(attributes + length, sizeof(attributes) - length, "%s%d=%d", i ? "," : "", one.id,
                            one.value.flag);
  }
  return called("cuLaunchKernelEx", " %x grid %u %u %u block %u %u %u shared %u stream %x attributes %s params %lx",
                number(function), c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                c->shared_bytes, number(c->stream), attributes, *static_cast<unsigned long*>(params[0]));
}
#endif

}  // extern "C"
#pragma GCC visibility pop
