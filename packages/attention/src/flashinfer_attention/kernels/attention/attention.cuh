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

// S = Q K^T for this warp's rows and keys.
template <typename T, typename Tile, typename Keys>
__device__ void score(Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], typename Tile::Queries q, Keys k,
                      int first_row, int first_key, int lane) {
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
    FragmentA rows[Tile::kRowBlocks];
#pragma unroll
    for (int r = 0; r < Tile::kRowBlocks; ++r) {
      if constexpr (Keys::kChunkElements == 16) {
        q.load_fours(rows[r], first_row + 16 * r, step, lane);
      } else {
        q.load(rows[r], first_row + 16 * r, step, lane);
      }
    }
#pragma unroll
    for (int block = 0; block < Tile::kKeyBlocks; block += 2) {
      FragmentB keys[2];
      k.load_transposed(keys, first_key + 8 * block, step, lane);
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        mma<T>(s[r][block], rows[r], keys[0]);
        mma<T>(s[r][block + 1], rows[r], keys[1]);
      }
    }
  }
}

// O += P V for this warp's rows and keys.
template <typename T, typename Tile>
__device__ void accumulate(Accumulator (&o)[Tile::kRowBlocks][Tile::kDimBlocks],
                           const Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], typename Tile::Values v,
                           int first_key, int lane) {
#pragma unroll
  for (int step = 0; step < Tile::kWarpKeys / 16; ++step) {
    FragmentA weights[Tile::kRowBlocks];
#pragma unroll
    for (int r = 0; r < Tile::kRowBlocks; ++r) weights[r] = probabilities<T>(s[r][2 * step], s[r][2 * step + 1]);
#pragma unroll
    for (int block = 0; block < Tile::kDimBlocks; block += 2) {
      FragmentB values[2];
      v.load(values, first_key + 16 * step, block / 2, lane);
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        mma<T>(o[r][block], weights[r], values[0]);
        mma<T>(o[r][block + 1], weights[r], values[1]);
      }
    }
  }
}

// m' = max(m, rowmax(S)); P = exp(S - m'); l = l exp(m - m') + rowsum(P); O = O exp(m - m').
template <typename Tile>
__device__ void rescale(Accumulator (&s)[Tile::kRowBlocks][Tile::kKeyBlocks], RowState (&state)[Tile::kRowBlocks],
                        Accumulator (&o)[Tile::kRowBlocks][Tile::kDimBlocks], float scale) {
#pragma unroll
  for (int r = 0; r < Tile::kRowBlocks; ++r) {
    float correction[2];
    softmax(s[r], state[r], scale, correction);
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
    const QueryRows queries{item, p.group};
    key = item.kv_begin;
    kv_end = item.kv_end;
    smallest_limit = queries.key_limit(0, p.causal);
    if (Scores::kGeneral) {
      largest_begin = p.mask != nullptr ? kv_end : window_begin(p, queries, queries.query(Tile::kRows - 1));
    }
    scale = logit_scale(p, item.kv_head);
    // Copies are waited for with the first tile; of an item without one they would race with those of the next.
    if (Tile::kQueryBuffers == 1 && key < kv_end) {
      __syncthreads();  // all are done with the queries of the item before
      load_queries<Tile, Scores>(p, queries, tile.q(0));
      commit_copies();
    }
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
      const QueryRows queries{item, p.group};
#pragma unroll
      for (int r = 0; r < Tile::kRowBlocks; ++r) {
        const int row = first_row + 16 * r + lane / 4;
        const int32_t limit[2] = {queries.key_limit(row, p.causal), queries.key_limit(row + 8, p.causal)};
        mask_scores(s[r], limit, key + first_key, lane);
        if (Scores::kGeneral && key < largest_begin) mask_more(p, queries, s[r], row, key + first_key, lane);
      }
    }
    rescale<Tile>(s, state, o, exponent_scale);
    accumulate<Operand, Tile>(o, s, tile.v(pipeline.stage), first_key, lane);
    pipeline.stage ^= 1;
  }

  const WorkItem item = work.at<Tile>(index);
  const QueryRows queries{item, p.group};
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
  const Work work(p);
  if constexpr (Scores::kRotates) rotation_begins(p, SharedTile<Tile>{shared});
  Pipeline<Tile, Scores> pipeline{{shared}, KeyStream<Tile, Scores>(work)};
  pipeline.stream.load(pipeline.tile, 0);
  for (int32_t i = work.index; i < work.end; i += work.step) attend<T, Tile, Scores>(work, i, pipeline);
}

}  // namespace attention
}  // namespace flashinfer
