// Leave an item's result: to o and lse where the item is whole, to the partial buffers where it is one of several
// pieces.
#pragma once

#include "attention/scores.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"

namespace flashinfer {
namespace attention {

template <typename T>
__device__ void store_pair(uint16_t* target, bool aligned, float low, float high) {
  const uint32_t pair = pack<T>(low, high);
  if (aligned) {
    *reinterpret_cast<uint32_t*>(target) = pair;
  } else {
    target[0] = static_cast<uint16_t>(pair);
    target[1] = static_cast<uint16_t>(pair >> 16);
  }
}

// What is left to do for one row: its sum of values times `scale` is the output.
struct RowResult {
  float scale;
  float lse;
};

// A sink is one more term of the sum, without a value; it belongs to the row, so not to a piece of it.
__device__ inline RowResult row_result(float max, float sum, const float* sink) {
  float correction = 1.0f;
  if (sink != nullptr) {
    const float logit = *sink * kLog2e;
    const float larger = fmaxf(max, logit);
    const float zero = finite_or_zero(larger);
    correction = exp2_approx(max - zero);
    sum = sum * correction + exp2_approx(logit - zero);
    max = larger;
  }
  return {correction * inverse_sum(sum), natural_lse(max, sum)};
}

// Bring the even and odd columns of sixteen, which two blocks have where V is 8-bit, into pairs.
template <int kBlocks>
__device__ void deal_columns(Accumulator (&o)[kBlocks]) {
#pragma unroll
  for (int block = 0; block < kBlocks; block += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float odd = o[block + 1].x[2 * half];
      o[block + 1].x[2 * half] = o[block].x[2 * half + 1];
      o[block].x[2 * half + 1] = odd;
    }
  }
}

// The first of the two columns that a lane has of a block; dealt columns lie four by four.
template <bool kDealt>
__device__ int column_of(int block, int lane) {
  return kDealt ? block / 2 * 16 + lane % 4 * 4 + block % 2 * 2 : block * 8 + lane % 4 * 2;
}

// Store 8 * kBlocks columns from `column` on of the two rows that this lane holds of the 16 from `first_row` on.
template <typename T, typename Scores, bool kDealt, int kBlocks>
__device__ void store_rows(const AttentionParams& p, const QueryRows& queries, int first_row, int column,
                           const Accumulator (&o)[kBlocks], const RowState& state) {
  const int lane = threadIdx.x % 32;
  const bool writes_lse = column + lane % 4 == 0;
  const float factor = value_scale(p, queries.item.kv_head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
    if (!queries.exists(row)) continue;
    const int32_t head = queries.head(row);
    const bool whole = queries.item.partial < 0;
    const float* sink = whole && p.sinks != nullptr ? p.sinks + head : nullptr;
    const RowResult result = row_result(state.max[half], state.sum[half], sink);
    const float scale = result.scale * factor;
    if (!whole) {
      const int64_t partial = static_cast<int64_t>(queries.item.partial) + row;
      if (writes_lse) p.partial_lse[partial] = result.lse;
      float* target = p.partial_o + partial * p.head_dim_vo + column;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int pair = column_of<kDealt>(block, lane);
        if (Scores::kGeneral && column + pair >= p.head_dim_vo) continue;
        *reinterpret_cast<float2*>(target + pair) = {o[block].x[2 * half] * scale, o[block].x[2 * half + 1] * scale};
      }
    } else {
      const int64_t token = queries.token(row);
      if (writes_lse && p.lse != nullptr) p.lse[token * p.kv_heads * p.group + head] = result.lse * p.lse_scale;
      auto* target = static_cast<uint16_t*>(p.o) + token * p.o_stride_token + head * p.o_stride_head + column;
      const bool aligned = reinterpret_cast<uint64_t>(target) % 4 == 0;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int pair = column_of<kDealt>(block, lane);
        if (Scores::kGeneral && column + pair >= p.head_dim_vo) continue;
        store_pair<T>(target + pair, aligned, o[block].x[2 * half] * scale, o[block].x[2 * half + 1] * scale);
      }
    }
  }
}

// Combine the results of warps that saw different keys of the same 16 rows, and store them, each warp a share of the
// columns. `state.sum` is complete; `stage` is not in use.
template <typename T, typename Tile, typename Scores>
__device__ void combine_and_store(const AttentionParams& p, const QueryRows& queries, const SharedTile<Tile>& tile,
                                  int stage, const Accumulator (&o)[Tile::kDimBlocks], const RowState& state) {
  constexpr int kBlocks = Tile::kDimBlocks / Tile::kWarpsOverKeys;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float* const states = tile.states();
  // Blocks of eight columns are swizzled by row, so that four rows of one block fall into different banks.
  const auto value = [&](int row, int column) {
    return reinterpret_cast<float2*>(tile.values(stage) + row * Tile::kHeadDimVo + (column ^ (row & 3) * 8));
  };
  __syncthreads();  // all warps are done with the stage
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + lane / 4 + 8 * half;
    if (lane % 4 == 0) {
      states[2 * row] = state.max[half];
      states[2 * row + 1] = state.sum[half];
    }
#pragma unroll
    for (int block = 0; block < Tile::kDimBlocks; ++block) {
      *value(row, column_of<Tile::kNarrow>(block, lane)) = {o[block].x[2 * half], o[block].x[2 * half + 1]};
    }
  }
  __syncthreads();
  Accumulator total[kBlocks] = {};
  RowState combined = empty_rows();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int other = 0; other < Tile::kWarps; ++other) {
      combined.max[half] = fmaxf(combined.max[half], states[2 * (other * 16 + row)]);
    }
    const float zero = finite_or_zero(combined.max[half]);
#pragma unroll
    for (int other = 0; other < Tile::kWarps; ++other) {
      const float weight = exp2_approx(states[2 * (other * 16 + row)] - zero);
      combined.sum[half] += weight * states[2 * (other * 16 + row) + 1];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float2 pair = *value(other * 16 + row, column_of<false>(warp * kBlocks + block, lane));
        total[block].x[2 * half] += weight * pair.x;
        total[block].x[2 * half + 1] += weight * pair.y;
      }
    }
  }
  store_rows<T, Scores, false>(p, queries, 0, warp * kBlocks * 8, total, combined);
}

}  // namespace attention
}  // namespace flashinfer
