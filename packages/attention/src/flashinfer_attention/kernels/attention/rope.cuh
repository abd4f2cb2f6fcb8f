// What is done to queries and keys between their arrival in shared memory and their product: rotation by position (Su
// et al., 2021, arXiv:2104.09864), and fp16 for queries that meet 8-bit keys.
//
// A row's halves make pairs, column d with d + head_dim / 2. Rows are rotated once a tile for all warps.
#pragma once

#include "attention/scores.cuh"
#include "attention/tile.cuh"
#include "core/fp8.cuh"
#include "core/math.cuh"

namespace flashinfer {
namespace attention {

template <typename Element>
__device__ void load_four(float (&x)[4], const void* shared) {
  if constexpr (sizeof(Element) == 1) {
    const uint32_t four = *static_cast<const uint32_t*>(shared);
    const uint32_t pairs[2] = {Fp8<Element>::template pair<0, 1>(four), Fp8<Element>::template pair<2, 3>(four)};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = widen(f16{static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2))});
  } else {
    const uint2 four = *static_cast<const uint2*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = widen(Element{static_cast<uint16_t>((i < 2 ? four.x : four.y) >> 16 * (i % 2))});
  }
}

template <typename T>
__device__ void store_four(void* shared, const float (&x)[4]) {
  *static_cast<uint2*>(shared) = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
}

// How many turns one position is, for each pair: as two floats, as the product with a position must be right to a small
// part of a turn, also where it is thousands of turns.
__device__ inline void fill_turns(const AttentionParams& p, float2* turns) {
  for (int pair = threadIdx.x; pair < p.head_dim / 2; pair += blockDim.x) {
    const double exponent = -2.0 * pair / p.head_dim * static_cast<double>(p.rope_log2_theta);
    const double exact = exp2(exponent) * static_cast<double>(p.rope_rcp_scale) * 0.15915494309189535;  // 1 / (2 pi)
    const float high = static_cast<float>(exact);
    turns[pair] = {high, static_cast<float>(exact - static_cast<double>(high))};
  }
}

// Prepare a CTA's memory: columns of rotated keys that no key has stay zero. The first tile's barrier makes it seen.
template <typename Tile>
__device__ void rotation_begins(const AttentionParams& p, const SharedTile<Tile>& tile) {
  fill_turns(p, tile.turns());
  if constexpr (!Tile::kNarrow) return;
  for (int i = threadIdx.x; i < Tile::kKeys * (Tile::kHeadDim / 4); i += Tile::kThreads) {
    store_four<f16>(tile.rotated_keys(0).four(i / (Tile::kHeadDim / 4), i % (Tile::kHeadDim / 4) * 4), {});
  }
}

// Turn four neighbouring pairs.
__device__ inline void rotate(float (&low)[4], float (&high)[4], float position, const float2* turns) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float whole = position * turns[i].x;
    const float rest = fmaf(position, turns[i].y, fmaf(position, turns[i].x, -whole));
    const float2 turn = cosine_and_sine(6.2831853071795865f * (whole - rintf(whole) + rest));
    const float x = low[i];
    low[i] = x * turn.x - high[i] * turn.y;
    high[i] = high[i] * turn.x + x * turn.y;
  }
}

// Rotate the keys of a stage: in place, or into fp16 where 8 bits could not hold the result.
template <typename T, typename Tile>
__device__ void rotate_keys(const AttentionParams& p, const SharedTile<Tile>& tile, int stage, int32_t first_key) {
  constexpr int kFours = Tile::kHeadDim / 8;  // of half a row
  const auto keys = tile.k(stage);
  const auto rotated = tile.rotated_keys(stage);
  const int half = p.head_dim / 2;
  for (int i = threadIdx.x; i < Tile::kKeys * kFours; i += Tile::kThreads) {
    const int row = i / kFours;
    const int pair = i % kFours * 4;
    if (pair >= half) continue;
    float low[4], high[4];
    load_four<typename Tile::Element>(low, keys.four(row, pair));
    load_four<typename Tile::Element>(high, keys.four(row, pair + half));
    rotate(low, high, static_cast<float>(first_key + row), tile.turns() + pair);
    store_four<T>(rotated.four(row, pair), low);
    store_four<T>(rotated.four(row, pair + half), high);
  }
}

// A power of two that brings a row whose largest magnitude this is to where fp16 loses least.
__device__ inline float fitting_scale(float largest, float& inverse) {
  const int exponent = min(max(__float_as_int(largest) >> 23, 15), 254);
  inverse = __int_as_float((exponent - 14) << 23);
  return __int_as_float((268 - exponent) << 23);
}

// Rotate the queries of an item, and turn bf16 into fp16 where keys are 8-bit, each row by a scale of its own.
template <typename From, typename To, typename Tile, typename Scores>
__device__ void prepare_queries(const AttentionParams& p, const QueryRows& queries, const SharedTile<Tile>& tile,
                                typename Tile::Queries rows) {
  constexpr int kFours = Tile::kHeadDim / 8;
  constexpr int kTurns = (kFours + 31) / 32;
  const int half = p.head_dim / 2;
  for (int row = threadIdx.x / 32; row < Tile::kRows; row += Tile::kWarps) {
    float low[kTurns][4] = {}, high[kTurns][4] = {};
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int pair = (i * 32 + threadIdx.x % 32) * 4;
      if (pair >= half) continue;
      load_four<From>(low[i], rows.four(row, pair));
      load_four<From>(high[i], rows.four(row, pair + half));
      if constexpr (Scores::kRotates) {
        const float position = static_cast<float>(queries.position(queries.query(row)));
        rotate(low[i], high[i], position, tile.turns() + pair);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fmaxf(fabsf(low[i][j]), fabsf(high[i][j])));
    }
    float inverse = 1.0f;
    const float scale = Tile::kNarrow ? fitting_scale(warp_max(largest), inverse) : 1.0f;
    if (Tile::kNarrow && threadIdx.x % 32 == 0) tile.row_scales()[row] = inverse;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int pair = (i * 32 + threadIdx.x % 32) * 4;
      if (pair >= half) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        low[i][j] *= scale;
        high[i][j] *= scale;
      }
      store_four<To>(rows.four(row, pair), low[i]);
      store_four<To>(rows.four(row, pair + half), high[i]);
    }
  }
}

}  // namespace attention
}  // namespace flashinfer
