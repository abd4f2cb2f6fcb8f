// Arithmetic that kernels call by name: base-2 exponential and logarithm, packing to 16 bits, sums across lanes.
#pragma once

#include "core/types.h"

namespace flashinfer {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float negative_infinity() { return __int_as_float(0xff800000); }

// The same number, from which nothing can be computed earlier than here: what a compiler would move out of a loop, such
// as the reciprocal of a divisor, would keep a register all through it.
__device__ inline int32_t computed_here(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x to 2 ulp; 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp; 0 for infinity.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); -inf for 0.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Cosine and sine of an angle in [-pi, pi], to 2^-20.
__device__ inline float2 cosine_and_sine(float angle) {
  float2 y;
  asm("cos.approx.ftz.f32 %0, %2;\n sin.approx.ftz.f32 %1, %2;" : "=f"(y.x), "=f"(y.y) : "f"(angle));
  return y;
}

// An element as fp32, exactly.
__device__ inline float widen(float x) { return x; }

__device__ inline float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ inline float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Two elements in one register, `low` at the lower address, each rounded to nearest even.
template <typename T>
__device__ inline uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  uint32_t pair;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("{.reg .b16 a, b;\n cvt.rn.f16.f32 a, %1;\n cvt.rn.f16.f32 b, %2;\n mov.b32 %0, {a, b};}"
      : "=r"(pair)
      : "f"(low), "f"(high));
#endif
  return pair;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// Reductions over the four lanes that hold one row of a matrix fragment.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ inline float warp_max(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lane));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

}  // namespace flashinfer
