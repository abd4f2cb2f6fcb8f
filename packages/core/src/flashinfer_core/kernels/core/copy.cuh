// Copies of 16 bytes: global to shared memory without a register in between from sm_80, through registers before it.
#pragma once

#include "core/mma.cuh"
#include "core/types.h"

namespace flashinfer {

struct alignas(16) Vector16 {
  uint32_t x[4];
};

// Copy 16 bytes, or write 16 zero bytes where `valid` is false. Both addresses are multiples of 16.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<Vector16*>(shared) = valid ? *static_cast<const Vector16*>(global) : Vector16{};
#endif
}

// The same for addresses that are multiples of 2 only.
__device__ inline void copy_elements(void* shared, const void* global, bool valid) {
  const auto* source = static_cast<const uint16_t*>(global);
  Vector16 vector = {};
  if (valid) {
    for (int i = 0; i < 4; ++i) vector.x[i] = source[2 * i] | static_cast<uint32_t>(source[2 * i + 1]) << 16;
  }
  *static_cast<Vector16*>(shared) = vector;
}

// Close the group of copies issued so far.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `kPending` groups of this thread are under way.
template <int kPending>
__device__ inline void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace flashinfer
