// Matrix fragments of one warp: 16x16 by 16x8 products with fp32 accumulation, and the loads that feed them.
//
// From sm_80 one instruction covers 16 steps of the inner dimension; sm_75 has 8, so a product is issued as two.
#pragma once

#include "core/types.h"

namespace flashinfer {

// Lane l holds elements (row l / 4, columns 2 * (l % 4) and the next) of each 8x8 block:
struct FragmentA {
  uint32_t x[4];  // blocks (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
};
struct FragmentB {
  uint32_t x[2];  // blocks (k 0-7), (k 8-15), each 8 columns
};
struct Accumulator {
  float x[4];  // rows 0-7: two neighbouring columns, rows 8-15: the same columns
};

template <typename T>
__device__ inline void mma(Accumulator& c, const FragmentA& a, const FragmentB& b);

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline void mma<f16>(Accumulator& c, const FragmentA& a, const FragmentB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

template <>
__device__ inline void mma<bf16>(Accumulator& c, const FragmentA& a, const FragmentB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}
#else
__device__ inline void mma_k8(Accumulator& c, uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a0), "r"(a1), "r"(b));
}

template <>
__device__ inline void mma<f16>(Accumulator& c, const FragmentA& a, const FragmentB& b) {
  mma_k8(c, a.x[0], a.x[1], b.x[0]);
  mma_k8(c, a.x[2], a.x[3], b.x[1]);
}
#endif

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 blocks; lane l names the shared address of row l % 8 of block l / 8.
__device__ inline void load_matrix(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// Two blocks; lanes 0 to 15 name their rows.
__device__ inline void load_matrix(uint32_t (&x)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(row)
               : "memory");
}

// The same with every block transposed.
__device__ inline void load_matrix_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

__device__ inline void load_matrix_transposed(uint32_t (&x)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(row)
               : "memory");
}

}  // namespace flashinfer
