// Add the low-rank update of each token's own adapter: y += scale * (x A^T) B^T.
//
// One CTA a token: warps take rows of A in turn and leave the short vector x A^T in shared memory as fp32; threads then
// take output features. Tokens without an adapter cost one load.
#pragma once

#include "core/copy.cuh"
#include "core/math.cuh"
#include "lora/params.h"

namespace flashinfer {
namespace lora {

// The inner product of two rows of `count` elements, a multiple of 8, at addresses that are multiples of 16; all lanes
// get it.
template <typename T>
__device__ float dot(const T* a, const T* b, int32_t count) {
  float sum = 0.0f;
  for (int32_t i = threadIdx.x % 32 * 8; i < count; i += 32 * 8) {
    const Vector16 left = *reinterpret_cast<const Vector16*>(a + i);
    const Vector16 right = *reinterpret_cast<const Vector16*>(b + i);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const T low_a{static_cast<uint16_t>(left.x[word])}, high_a{static_cast<uint16_t>(left.x[word] >> 16)};
      const T low_b{static_cast<uint16_t>(right.x[word])}, high_b{static_cast<uint16_t>(right.x[word] >> 16)};
      sum = fmaf(widen(low_a), widen(low_b), sum);
      sum = fmaf(widen(high_a), widen(high_b), sum);
    }
  }
  return warp_sum(sum);
}

template <typename T>
__device__ void shrink(const LoraParams& p, const T* x, const T* a, float* low) {
  for (int32_t r = threadIdx.x / 32; r < p.rank; r += blockDim.x / 32) {
    const float sum = dot(x, a + r * p.a_stride_rank, p.in_features);
    if (threadIdx.x % 32 == 0) low[r] = sum;
  }
}

template <typename T>
__device__ void expand(const LoraParams& p, const float* low, const T* b, float scale, T* y) {
  for (int32_t feature = threadIdx.x; feature < p.out_features; feature += blockDim.x) {
    const T* row = b + feature * p.b_stride_feature;
    float sum = 0.0f;
    for (int32_t r = 0; r < p.rank; ++r) sum = fmaf(low[r], widen(row[r]), sum);
    y[feature] = T{static_cast<uint16_t>(pack<T>(fmaf(scale, sum, widen(y[feature])), 0.0f))};
  }
}

// Grid: one CTA a worker, any number; 256 threads.
template <typename T>
__global__ void __launch_bounds__(256) lora(const __grid_constant__ LoraParams p) {
  __shared__ float low[kMaxRank];
  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    const int32_t adapter = p.indices[token];
    if (adapter < 0 || adapter >= p.adapters) continue;  // the same for all threads of the CTA
    __syncthreads();                                     // the previous token's readers of `low`
    shrink(p, static_cast<const T*>(p.x) + token * p.x_stride_token,
           static_cast<const T*>(p.a) + adapter * p.a_stride_adapter, low);
    __syncthreads();
    expand(p, low, static_cast<const T*>(p.b) + adapter * p.b_stride_adapter,
           p.scales != nullptr ? p.scales[adapter] : 1.0f, static_cast<T*>(p.y) + token * p.y_stride_token);
  }
}

}  // namespace lora
}  // namespace flashinfer
