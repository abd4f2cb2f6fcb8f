// Merge the partial results of key ranges into attention's result: o = sum_s exp(lse_s - lse) o_s.
//
// (o, lse) is a commutative monoid with unit (0, -inf), so pieces may have been computed anywhere. One warp a row.
#pragma once

#include "attention/params.h"
#include "core/math.cuh"
#include "core/plan.h"

namespace flashinfer {
namespace attention {

// Natural log of the sum of exp(lse_s) over the pieces of a row; -inf where no piece saw a key.
__device__ inline float merged_lse(const float* lse, int32_t pieces, int32_t stride) {
  const int lane = threadIdx.x % 32;
  float max = negative_infinity();
  for (int32_t s = lane; s < pieces; s += 32) max = fmaxf(max, lse[static_cast<int64_t>(s) * stride]);
  max = warp_max(max);
  if (max == negative_infinity()) return max;
  float sum = 0.0f;
  for (int32_t s = lane; s < pieces; s += 32) {
    sum += exp2_approx((lse[static_cast<int64_t>(s) * stride] - max) * kLog2e);
  }
  return max + log2_approx(warp_sum(sum)) * kLn2;
}

template <typename T>
__device__ void merge_row(const MergeParams& p, const MergeItem& item, int32_t row) {
  const int lane = threadIdx.x % 32;
  const int32_t packed = item.row_begin + row;
  const int64_t token = static_cast<int64_t>(item.q_start) + packed / p.group;
  const int32_t head = item.kv_head * p.group + packed % p.group;
  const float* lse = p.partial_lse + item.partial + row;
  const float* partial = p.partial_o + (static_cast<int64_t>(item.partial) + row) * p.head_dim;
  const float total = merged_lse(lse, item.pieces, p.tile_rows);
  const float zero = total == negative_infinity() ? 0.0f : total;
  if (lane == 0 && p.lse != nullptr) p.lse[token * p.kv_heads * p.group + head] = total * p.lse_scale;
  auto* o = static_cast<uint16_t*>(p.o) + token * p.o_stride_token + head * p.o_stride_head;
  for (int32_t column = 2 * lane; column < p.head_dim; column += 64) {
    float2 sum = {0.0f, 0.0f};
#pragma unroll 4
    for (int32_t s = 0; s < item.pieces; ++s) {
      const int64_t offset = static_cast<int64_t>(s) * p.tile_rows;
      const float weight = exp2_approx((lse[offset] - zero) * kLog2e);
      const float2 value = *reinterpret_cast<const float2*>(partial + offset * p.head_dim + column);
      sum.x += weight * value.x;
      sum.y += weight * value.y;
    }
    const uint32_t pair = pack<T>(sum.x, sum.y);
    o[column] = static_cast<uint16_t>(pair);
    o[column + 1] = static_cast<uint16_t>(pair >> 16);
  }
}

// Grid: one CTA a worker, any number; 128 threads. Rows are dealt to warps, neighbours to different workers.
template <typename T>
__global__ void __launch_bounds__(128) merge(const __grid_constant__ MergeParams p) {
  const int32_t merges = p.merges != nullptr ? *p.num_merges : p.kv_heads * p.uniform.tiles;
  const int32_t warps = gridDim.x * 4;
  for (int64_t i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < static_cast<int64_t>(merges) * p.tile_rows;
       i += warps) {
    const int32_t index = static_cast<int32_t>(i / p.tile_rows);
    const int32_t row = static_cast<int32_t>(i % p.tile_rows);
    const MergeItem item = p.merges != nullptr
                               ? p.merges[index]
                               : uniform_merge(p.uniform, p.group, p.kv_heads, p.tile_rows, index);
    if (row < item.rows) merge_row<T>(p, item, row);
  }
}

}  // namespace attention
}  // namespace flashinfer
