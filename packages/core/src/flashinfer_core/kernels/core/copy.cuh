// Copies of 16 bytes: global to shared memory without a register in between from sm_80, through registers before it.
#pragma once

#include "core/mma.cuh"
#include "core/types.h"

namespace flashinfer {

struct alignas(16) Vector16 {
  uint32_t x[4];
};

// Read 16 bytes that nobody reads again, so that they take no room in the L1 cache.
__device__ inline Vector16 load_once(const Vector16* from) {
  Vector16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "l"(from));
  return v;
}

// Copy the first `bytes` of 16, and write zeros for the others. Both addresses are multiples of 16; bytes is 0, 8
// or 16.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
#else
  Vector16 vector = {};
  const auto* source = static_cast<const uint2*>(global);
  if (bytes == 16) {
    vector = *static_cast<const Vector16*>(global);
  } else if (bytes == 8) {
    vector = {{source->x, source->y, 0, 0}};
  }
  *static_cast<Vector16*>(shared) = vector;
#endif
}

// The same for an address that is a multiple of the element's size only.
template <typename Element>
__device__ inline void copy_elements(void* shared, const void* global, int bytes) {
  constexpr int kPerWord = 4 / sizeof(Element);
  const auto* source = static_cast<const Element*>(global);
  Vector16 vector = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * i >= bytes) break;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      vector.x[i] |= static_cast<uint32_t>(source[i * kPerWord + j].bits) << (32 / kPerWord * j);
    }
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
