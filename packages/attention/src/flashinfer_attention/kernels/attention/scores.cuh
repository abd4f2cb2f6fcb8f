// From products of queries and keys to what the softmax takes: scales, bias, soft cap and masks.
//
// `Plain` scales inside the exponential and masks the last tiles only. `General` has every option as a branch on a
// parameter, which all threads take alike, so an option that is off costs one test a tile.
#pragma once

#include "attention/tile.cuh"
#include "core/math.cuh"

namespace flashinfer {
namespace attention {

// Causal or full attention over rows as wide as the tile.
struct Plain {
  static constexpr bool kGeneral = false;
};

// Window, mask, bias, soft cap, and rows narrower than the tile.
struct General {
  static constexpr bool kGeneral = true;
};

__device__ inline float loaded_or(const float* value, int32_t index, float otherwise) {
  return value == nullptr ? otherwise : value[index];
}

// What turns q k^T into a logit in base 2, and a mean of values into the output.
__device__ inline float logit_scale(const AttentionParams& p, int32_t kv_head) {
  return p.sm_scale * kLog2e * loaded_or(p.q_scale, 0, 1.0f) * loaded_or(p.k_scale, kv_head * p.k_scale_stride, 1.0f);
}
__device__ inline float value_scale(const AttentionParams& p, int32_t kv_head) {
  return p.v_factor * loaded_or(p.v_scale, kv_head * p.v_scale_stride, 1.0f);
}

__device__ inline bool mask_bit(const AttentionParams& p, const WorkItem& item, int32_t query, int32_t key) {
  const int64_t bit = static_cast<int64_t>(query) * item.kv_len + key;
  const int64_t first = p.mask_indptr == nullptr ? 0 : p.mask_indptr[item.request];
  return p.mask[first + bit / 8] >> (bit % 8) & 1;
}

// Whether a query of the request sees a key of it.
__device__ inline bool is_visible(const AttentionParams& p, const WorkItem& item, int32_t query, int32_t key) {
  const int32_t position = query + item.kv_len - item.q_len;
  if (p.causal && key > position) return false;
  if (p.window_left >= 0 && position - key > p.window_left) return false;
  return p.mask == nullptr || mask_bit(p, item, query, key);
}

// Whether any row of a tile sees a key before the end of its piece.
__device__ inline bool is_seen(const AttentionParams& p, const QueryRows& queries, int32_t key, int32_t tile_rows) {
  const int32_t first = queries.query(0);
  if (p.mask == nullptr) return p.window_left < 0 || queries.position(first) - key <= p.window_left;
  const int32_t last = min(queries.query(tile_rows - 1), queries.item.q_len - 1);
  for (int32_t query = first; query <= last; ++query) {
    if (is_visible(p, queries.item, query, key)) return true;
  }
  return false;
}

// Set scores of keys that a row does not see to -inf. `limit` is one past the last key each of the two rows sees.
template <int kKeyBlocks>
__device__ void mask_scores(Accumulator (&s)[kKeyBlocks], const int32_t (&limit)[2], int32_t first_key, int lane) {
#pragma unroll
  for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t key = first_key + block * 8 + lane % 4 * 2 + i % 2;
      if (key >= limit[i / 2]) s[block].x[i] = negative_infinity();
    }
  }
}

// The slope of a head's bias (Press et al., 2021, arXiv:2108.12409): a geometric sequence, and for heads beyond a power
// of two every second of the one twice as long.
__device__ inline float alibi_slope(int32_t head, int32_t num_heads) {
  const int32_t power = 1 << (31 - __clz(num_heads));
  const float exponent = head < power ? -8.0f * (head + 1) / power : -4.0f * (2 * (head - power) + 1) / power;
  return exp2_approx(exponent);
}

// tanh to 2^-22 of 1, which the hardware's is not.
__device__ inline float tanh_exact(float x) { return 1.0f - 2.0f / (exp2_approx(2.0f * kLog2e * x) + 1.0f); }

// Apply all options to the scores of two rows (`row` and `row + 8` of the tile) and this lane's keys of a warp's slice;
// leave logits in base 2.
template <int kKeyBlocks>
__device__ void finish_scores(const AttentionParams& p, const QueryRows& queries, Accumulator (&s)[kKeyBlocks], int row,
                              int32_t first_key, int lane, float scale) {
  const int32_t query[2] = {queries.query(row), queries.query(row + 8)};
  const int32_t own_key = first_key + lane % 4 * 2;
  for (Accumulator& block : s) {
    for (float& x : block.x) x *= scale;
  }
  if (p.alibi) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float slope = kLog2e * alibi_slope(queries.head(row + 8 * half), p.kv_heads * p.group);
      const int32_t distance = own_key - queries.position(query[half]);
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[block].x[2 * half + i];
          x = fmaf(slope, static_cast<float>(distance + 8 * block + i), x);
        }
      }
    }
  }
  if (p.logits_soft_cap > 0.0f) {
    const float cap = p.logits_soft_cap * kLog2e;
    const float inverse = 1.0f / cap;
    for (Accumulator& block : s) {
      for (float& x : block.x) x = cap * tanh_exact(x * inverse);
    }
  }
  const bool ends = first_key + 8 * kKeyBlocks > queries.key_limit(row - lane / 4, p.causal);
  const bool begins = p.window_left >= 0 && queries.position(query[1]) + 8 - first_key > p.window_left;
  if (!__any_sync(0xffffffff, ends || begins || p.mask != nullptr)) return;
#pragma unroll
  for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t key = own_key + 8 * block + i % 2;
      const bool inside = key < queries.item.kv_end && queries.exists(row + i / 2 * 8);
      if (!inside || !is_visible(p, queries.item, query[i / 2], key)) s[block].x[i] = negative_infinity();
    }
  }
}

}  // namespace attention
}  // namespace flashinfer
