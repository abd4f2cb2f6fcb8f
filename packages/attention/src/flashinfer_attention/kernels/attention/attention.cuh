// Attention of packed query rows over ragged or paged keys and values: prefill and decode on sm_75 and newer.
//
// FlashAttention-2 (Dao, 2023, arXiv:2307.08691) on mma.sync: a CTA holds a tile of query rows, streams K and V through
// two stages of shared memory and keeps the softmax state in registers. CTAs are persistent: each walks its own list of
// work items, and the stream of K and V does not pause between them.
#pragma once

#include "attention/load.cuh"
#include "attention/output.cuh"
#include "attention/rope.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "core/uniform.h"

namespace flashinfer {
namespace attention {

// S = Q K^T for this warp's rows and keys. Fragments are loaded one block before they are used.
template <typename T, typename Tile, typename Keys>
__device__ void score(Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], typename Tile::Queries q, Keys k,
                      int first_row, int first_key, int lane) {
  constexpr int kSteps = Tile::kHeadDim / 16;
  constexpr int kPairs = Tile::kKeyBlocks / 2;
  FragmentA rows[2][Tile::kRowBlocks];
  FragmentB keys[2][2];
  const auto load_rows = [&](int r, int step) {
    if constexpr (Keys::kChunkElements == 16) {
      q.load_fours(rows[step % 2][r], first_row + 16 * r, step, lane);
    } else {
      q.load(rows[step % 2][r], first_row + 16 * r, step, lane);
    }
  };
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) load_rows(r, 0);
  k.load_transposed(keys[0], first_key, 0, lane);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int i = step * kPairs + pair;
      const int next = i + 1;
      if (next < kSteps * kPairs) {
        k.load_transposed(keys[next % 2], first_key + next % kPairs * 16, next / kPairs, lane);
      }
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        if (pair == 0 && step + 1 < kSteps) load_rows(r, step + 1);
        mma<T>(s[r][2 * pair], rows[step % 2][r], keys[i % 2][0]);
        mma<T>(s[r][2 * pair + 1], rows[step % 2][r], keys[i % 2][1]);
      }
    }
  }
}

// P = exp(S - m); l += rowsum(P); O += P V for this warp's rows and keys. Exponentials of the next 16 keys are taken
// while the tensor cores multiply those of the last.
template <typename T, typename Tile>
__device__ void accumulate(Accumulator (&o)[Tile::kRowBlocks][Tile::kDimBlocks], RowState (&state)[Tile::kRowBlocks],
                           const Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], typename Tile::Values v,
                           int first_key, int lane, float scale) {
  constexpr int kSteps = Tile::kWarpKeys / 16;
  constexpr int kPairs = Tile::kDimBlocks / 2;
  FragmentA weights[2][Tile::kRowBlocks];
  FragmentB values[2][2];
  v.load(values[0], first_key, 0, lane);
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) weights[0][r] = probabilities<T>(s[r][0], s[r][1], state[r], scale);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int r = 0; r < Tile::kRowBlocks && step + 1 < kSteps; ++r) {
      weights[(step + 1) % 2][r] = probabilities<T>(s[r][2 * step + 2], s[r][2 * step + 3], state[r], scale);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int i = step * kPairs + pair;
      const int next = i + 1;
      if (next < kSteps * kPairs) v.load(values[next % 2], first_key + next / kPairs * 16, next % kPairs, lane);
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        mma<T>(o[r][2 * pair], weights[step % 2][r], values[i % 2][0]);
        mma<T>(o[r][2 * pair + 1], weights[step % 2][r], values[i % 2][1]);
      }
    }
  }
}

// m' = max(m, rowmax(S)); l = l exp(m - m'); O = O exp(m - m').
template <typename Tile>
__device__ void rescale(const Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], RowState (&state)[Tile::kRowBlocks],
                        Accumulator (&o)[Tile::kRowBlocks][Tile::kDimBlocks], float scale) {
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) {
    float correction[2];
    raise_max(s[r], state[r], scale, correction);
    // Late tiles seldom raise a maximum; multiplying by 1 is skipped exactly.
    if (!__any_sync(0xffffffff, correction[0] != 1.0f || correction[1] != 1.0f)) continue;
#pragma unroll
    for (int block = 0; block < Tile::kDimBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[r][block].x[i] *= correction[i / 2];
    }
  }
}

// Take back what `prepare_queries` scaled the rows by.
template <typename Tile>
__device__ void scale_rows(Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], const float* scales, int lane) {
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) {
    const float scale[2] = {scales[16 * r + lane / 4], scales[16 * r + lane / 4 + 8]};
#pragma unroll
    for (int block = 0; block < Tile::kKeyBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[r][block].x[i] *= scale[i / 2];
    }
  }
}

// What a CTA carries from one work item to the next.
template <typename Tile, typename Scores>
struct Pipeline {
  SharedTile<Tile> tile;
  KeyStream<Tile, Scores> stream;
  int stage = 0;   // of the tile that is used next
  int buffer = 0;  // of the queries that are used next
};

// One work item from its query rows to its result. The item is read anew where it is needed: its fields would keep
// registers from the matrices.
template <typename T, typename Tile, typename Scores>
__device__ void attend(const Work& work, int32_t index, Pipeline<Tile, Scores>& pipeline) {
  using Operand = typename Operands<T, Tile::kNarrow>::Type;
  constexpr bool kPrepares = Scores::kRotates || (Tile::kNarrow && !kSame<T, Operand>);
  const AttentionParams& p = work.p;
  const SharedTile<Tile>& tile = pipeline.tile;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_row = Tile::kWarpsOverRows == 1 ? 0 : warp * Tile::kRowBlocks * 16;
  const int first_key = Tile::kWarpsOverKeys == 1 ? 0 : warp * Tile::kWarpKeys;
  int32_t key, kv_end, smallest_limit;
  int32_t largest_begin = 0;  // keys from here to the limit are seen by all rows
  float scale;
  {
    const WorkItem item = work.at<Tile>(index);
    key = item.kv_begin;
    kv_end = item.kv_end;
    const QueryRows queries(item, p.group);
    smallest_limit = queries.key_limit(0, p.causal);
    if (Scores::kGeneral) {
      largest_begin = p.mask != nullptr ? kv_end : window_begin(p, queries, queries.query(Tile::kRows - 1));
    }
    scale = logit_scale(p, item.kv_head);
    if (Tile::kQueryBuffers == 2 && key < kv_end) pipeline.buffer ^= 1;
  }
  RowState state[Tile::kRowBlocks];
  Accumulator o[Tile::kRowBlocks][Tile::kDimBlocks] = {};
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) state[r] = empty_rows();

  for (; key < kv_end; key += Tile::kKeys) {
    wait_copies<0>();
    __syncthreads();  // this tile has arrived for all, and all are done with the stage that is filled next
    pipeline.stream.load(tile, pipeline.stage ^ 1);
    Accumulator s[Tile::kRowBlocks][Tile::kKeyBlocks] = {};
    const auto q = tile.q(Tile::kQueryBuffers == 2 ? pipeline.buffer ^ 1 : 0);
    if constexpr (kPrepares) {
      const WorkItem item = work.at<Tile>(index);
      if (key == item.kv_begin) prepare_queries<T, Operand, Tile, Scores>(p, {item, p.group}, tile, q);
      if constexpr (Scores::kRotates) rotate_keys<Operand>(p, tile, pipeline.stage, key);
      __syncthreads();
    }
    if constexpr (Scores::kRotates) {
      score<Operand, Tile>(s, q, tile.rotated_keys(pipeline.stage), first_row, first_key, lane);
    } else {
      score<Operand, Tile>(s, q, tile.k(pipeline.stage), first_row, first_key, lane);
    }
    if constexpr (kPrepares && Tile::kNarrow) scale_rows<Tile>(s, tile.row_scales() + first_row, lane);
    float exponent_scale = scale;
    if (Scores::kGeneral && changes_logits(p)) {
      const WorkItem item = work.at<Tile>(index);
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        change_logits(p, {item, p.group}, s[r], first_row + 16 * r + lane / 4, key + first_key, lane, scale);
      }
      exponent_scale = 1.0f;
    }
    if (key + Tile::kKeys > smallest_limit || (Scores::kGeneral && key < largest_begin)) {
      const WorkItem item = work.at<Tile>(index);
      const QueryRows queries(item, p.group);
      const int lane_row = computed_here(first_row + lane / 4);
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        const int row = lane_row + 16 * r;
        const int32_t limit[2] = {queries.key_limit(row, p.causal), queries.key_limit(row + 8, p.causal)};
        mask_scores(s[r], limit, key + first_key, lane);
        if (Scores::kGeneral && key < largest_begin) mask_more(p, queries, s[r], row, key + first_key, lane);
      }
    }
    rescale<Tile>(s, state, o, exponent_scale);
    accumulate<Operand, Tile>(o, state, s, tile.v(pipeline.stage), first_key, lane, exponent_scale);
    pipeline.stage ^= 1;
  }

  const WorkItem item = work.at<Tile>(index);
  const QueryRows queries(item, p.group);
  if (Tile::kQueryBuffers == 1 && item.kv_begin < item.kv_end) {
    __syncwarp();  // a warp's queries are its own: those of the next item may take their place
    work.load_queries<Tile, Scores>(work.after(index), tile.q(0));
  }
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) {
    for (int half = 0; half < 2; ++half) state[r].sum[half] = quad_sum(state[r].sum[half]);
    if constexpr (Tile::kNarrow) deal_columns(o[r]);
    if constexpr (Tile::kWarpsOverKeys > 1) {
      combine_and_store<T, Tile, Scores>(p, queries, tile, pipeline.stage ^ 1, o[r], state[r]);
    } else {
      store_rows<T, Scores, Tile::kNarrow>(p, queries, first_row + 16 * r, 0, o[r], state[r]);
    }
  }
}

// Grid: one CTA a worker, as many as the plan says; Tile::kThreads threads.
template <typename T, typename Tile, typename Scores>
__global__ void __launch_bounds__(Tile::kThreads, Scores::kMinCtas)
    attention(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const Work work{p};
  if constexpr (Scores::kRotates) rotation_begins(p, SharedTile<Tile>{shared});
  Pipeline<Tile, Scores> pipeline{{shared}, KeyStream<Tile, Scores>(work)};
  pipeline.stream.load(pipeline.tile, 0);
  if (Tile::kQueryBuffers == 1) work.load_queries<Tile, Scores>(work.begin(), pipeline.tile.q(0));
  for (int32_t i = work.begin(); i < work.end(); i = work.after(i)) attend<T, Tile, Scores>(work, i, pipeline);
}

}  // namespace attention
}  // namespace flashinfer
