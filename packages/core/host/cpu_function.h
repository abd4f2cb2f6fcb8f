// A CPU image (a small shared object) brought into this process from memory, without touching a file system.
#pragma once

#include <cstddef>
#include <memory>

#include "executor.h"

namespace flashinfer::host {

class CpuFunction {
 public:
  // Throws std::runtime_error that names the step that failed.
  CpuFunction(const void* payload, size_t bytes);

  CpuEntryPoint entry() const { return entry_; }

 private:
  struct Close {
    void operator()(void* library) const;
  };
  std::unique_ptr<void, Close> library_;
  CpuEntryPoint entry_;
};

}  // namespace flashinfer::host
