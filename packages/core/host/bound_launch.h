// Kernels in a row with parameters that lack only addresses.
//
// What a call costs is one copy of the parameters, one store for each address, and the launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu_function.h"
#include "cuda_function.h"

namespace flashinfer::host {

class BoundLaunch {
 public:
  struct Step {
    const CudaFunction* cuda;  // one of these two is null
    const CpuFunction* cpu;
    size_t params;  // offset of its parameters
    uint32_t workers;
    bool programmatic;  // see CudaFunction::launch
  };

  static constexpr size_t kMaxBytes = 1024;  // of all parameters: they are copied to the stack

  // `slots` has for each address the offsets in `params` where it belongs. Throws std::invalid_argument.
  BoundLaunch(std::vector<Step> steps, std::vector<unsigned char> params, std::vector<std::vector<size_t>> slots);

  size_t num_slots() const { return slots_.size(); }

  // Launches all steps; `addresses` has one for each slot. `where`: the raw stream on a GPU, the threads on a CPU. Any
  // number of threads may do so at once.
  void launch(const uint64_t* addresses, uintptr_t where) const;

 private:
  std::vector<Step> steps_;
  std::vector<unsigned char> params_;
  std::vector<std::vector<size_t>> slots_;
};

}  // namespace flashinfer::host
