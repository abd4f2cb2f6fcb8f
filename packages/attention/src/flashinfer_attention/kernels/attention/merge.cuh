// Merge the partial results of key ranges into attention's result: o = sum_s exp(lse_s - lse) o_s.
//
// (o, lse) is a commutative monoid with unit (0, -inf), so pieces may have been computed anywhere.
#pragma once

#include "attention/params.h"
#include "core/math.cuh"
#include "core/uniform.h"

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

// A sink joins the sum of its row here, as no piece of the row has it.
__device__ inline float lse_with_sink(float lse, float sink) {
  const float larger = fmaxf(lse, sink);
  if (larger == negative_infinity()) return larger;
  return larger + log2_approx(exp2_approx((lse - larger) * kLog2e) + exp2_approx((sink - larger) * kLog2e)) * kLn2;
}

constexpr int kMergeWarps = 4;
constexpr int kMaxHeadDim = 512;

// This warp's share of a row: four neighbouring columns a lane and 128 columns apart, of every `stride`-th piece.
struct RowSum {
  float4 columns[kMaxHeadDim / 128];
};

__device__ inline RowSum sum_pieces(const MergeParams& p, const float* o, const float* lse, float total, int32_t first,
                                    int32_t pieces, int32_t stride) {
  RowSum sum = {};
  const float zero = total == negative_infinity() ? 0.0f : total;
#pragma unroll 4
  for (int32_t s = first; s < pieces; s += stride) {
    const int64_t row = static_cast<int64_t>(s) * p.tile_rows;
    const float weight = exp2_approx((lse[row] - zero) * kLog2e);
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / 128; ++i) {
      const int column = i * 128 + threadIdx.x % 32 * 4;
      if (column >= p.head_dim_vo) break;
      const float4 value = *reinterpret_cast<const float4*>(o + row * p.head_dim_vo + column);
      sum.columns[i].x += weight * value.x;
      sum.columns[i].y += weight * value.y;
      sum.columns[i].z += weight * value.z;
      sum.columns[i].w += weight * value.w;
    }
  }
  return sum;
}

// Add what the other warps of the CTA have summed; the result is complete in the first warp.
__device__ inline void add_warps(RowSum& sum, float4 (&exchange)[kMergeWarps][32]) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (float4& columns : sum.columns) {
    exchange[warp][lane] = columns;
    __syncthreads();
    for (int other = 1; other < kMergeWarps && warp == 0; ++other) {
      const float4 more = exchange[other][lane];
      columns = {columns.x + more.x, columns.y + more.y, columns.z + more.z, columns.w + more.w};
    }
    __syncthreads();
  }
}

template <typename T>
__device__ void store_row(const MergeParams& p, const MergeItem& item, int32_t row, const RowSum& sum, float total) {
  const int lane = threadIdx.x % 32;
  const int32_t packed = item.row_begin + row;
  const int64_t token = static_cast<int64_t>(item.q_start) + packed / p.group;
  const int32_t head = item.kv_head * p.group + packed % p.group;
  if (lane == 0 && p.lse != nullptr) p.lse[token * p.kv_heads * p.group + head] = total * p.lse_scale;
  auto* o = static_cast<uint16_t*>(p.o) + token * p.o_stride_token + head * p.o_stride_head;
  for (int i = 0; i < kMaxHeadDim / 128; ++i) {
    const int column = i * 128 + lane * 4;
    if (column >= p.head_dim_vo) break;
    const uint32_t pairs[2] = {pack<T>(sum.columns[i].x, sum.columns[i].y),
                               pack<T>(sum.columns[i].z, sum.columns[i].w)};
    if (reinterpret_cast<uint64_t>(o) % 8 == 0) {
      *reinterpret_cast<uint2*>(o + column) = {pairs[0], pairs[1]};
    } else {
      for (int j = 0; j < 4; ++j) o[column + j] = static_cast<uint16_t>(pairs[j / 2] >> (16 * (j % 2)));
    }
  }
}

// Grid: one CTA a worker, any number; 128 threads. A warp takes a row of a large tile.
// A small tile means decoding, whose few rows have many pieces: there the warps of a CTA share a row.
template <typename T>
__global__ void __launch_bounds__(32 * kMergeWarps) merge(const __grid_constant__ MergeParams p) {
  __shared__ float4 exchange[kMergeWarps][32];
  const int32_t sharing = p.tile_rows <= 16 ? kMergeWarps : 1;
  const int32_t warp = threadIdx.x / 32;
  const int32_t merges = p.merges != nullptr ? *p.num_merges : p.kv_heads * p.uniform.tiles;
  const int64_t units = static_cast<int64_t>(merges) * p.tile_rows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kMergeWarps / sharing);
  for (int64_t unit = warp / sharing * static_cast<int64_t>(gridDim.x) + blockIdx.x; unit < units; unit += step) {
    const int32_t index = static_cast<int32_t>(unit / p.tile_rows);
    const int32_t row = static_cast<int32_t>(unit % p.tile_rows);
    const MergeItem item =
        p.merges != nullptr ? p.merges[index] : uniform_merge(p.uniform, p.group, p.tile_rows, index);
    if (row >= item.rows) continue;  // the same for all warps that share the row
    const int64_t first = static_cast<int64_t>(item.partial) + row;
    const float* lse = p.partial_lse + first;
    float total = merged_lse(lse, item.pieces, p.tile_rows);
    if (p.sinks != nullptr) {
      total = lse_with_sink(total, p.sinks[item.kv_head * p.group + (item.row_begin + row) % p.group]);
    }
    RowSum sum = sum_pieces(p, p.partial_o + first * p.head_dim_vo, lse, total, warp % sharing, item.pieces, sharing);
    if (sharing > 1) add_warps(sum, exchange);
    if (warp % sharing == 0) store_row<T>(p, item, row, sum, total);
  }
}

}  // namespace attention
}  // namespace flashinfer
