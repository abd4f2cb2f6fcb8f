// A kernel of a CUDA image, loaded into the primary context of one device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver.h"

namespace flashinfer::host {

struct DeviceFacts {
  char name[256];
  int capability_major;
  int capability_minor;
  int sm_count;
  int shared_optin_bytes;
  int l2_bytes;
  size_t total_memory;
  unsigned char uuid[16];
};

// Zero where the driver runs but finds no GPU.
int device_count();
DeviceFacts device_facts(int ordinal);

class CudaFunction {
 public:
  // Loads everything that a launch needs, also while a stream of this or another thread is being captured. `image` is
  // a cubin, or PTX that ends in a zero byte. Throws CudaError. The module is never unloaded: a captured graph may
  // hold the function for as long as the process lives.
  CudaFunction(const char* image, const char* entry, int device, int threads, int shared_bytes);

  // Queues `workers` CTAs on `stream`. `params` is the kernel's one parameter and is copied before this returns.
  // `programmatic`: begin while the kernel before on the stream still runs (programmatic stream serialization); for
  // kernels that wait for its results with griddepcontrol.wait, on compute capability 9.0 and newer. A driver without
  // launch attributes begins after it, which is always right.
  void launch(void* params, uint32_t workers, uintptr_t stream, bool programmatic = false) const;

  int registers() const { return registers_; }
  int shared_bytes() const { return static_shared_bytes_ + dynamic_shared_bytes_; }
  int max_workers() const { return max_workers_; }
  size_t params_bytes() const { return params_bytes_; }  // 0 where the driver does not tell

 private:
  void set_shared_bytes(const Driver& d) const;
  void read_attributes(const Driver& d, CudaDevice device);

  CudaContext context_;
  CudaFunctionHandle function_;
  int threads_;
  int dynamic_shared_bytes_;
  int static_shared_bytes_ = 0;
  int registers_ = 0;
  int max_workers_ = 0;
  size_t params_bytes_ = 0;
};

}  // namespace flashinfer::host
