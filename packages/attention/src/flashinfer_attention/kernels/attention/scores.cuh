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
  static constexpr int kMinCtas = 0;  // of an SM: left to the compiler
  static constexpr bool kGeneral = false;
  static constexpr bool kRotates = false;
};

// Window, mask, bias, soft cap, and rows narrower than the tile.
struct General {
  static constexpr int kMinCtas = 1;  // else the compiler spills to fit one more
  static constexpr bool kGeneral = true;
  static constexpr bool kRotates = false;
};

// The same with queries and keys rotated by their positions.
struct Rotary {
  static constexpr int kMinCtas = 1;
  static constexpr bool kGeneral = true;
  static constexpr bool kRotates = true;
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

// The first key that a window leaves to a query.
__device__ inline int32_t window_begin(const AttentionParams& p, const QueryRows& queries, int32_t query) {
  const int32_t position = queries.position(query);
  return p.window_left < 0 || position < p.window_left ? 0 : position - p.window_left;
}

// A query's row in the mask of its request. The row's first bit is found in 64 bits, as long requests have more than
// 2^32.
struct MaskRow {
  const uint8_t* bytes;
  uint32_t shift;  // of the first bit in its byte

  __device__ MaskRow(const AttentionParams& p, const WorkItem& item, int32_t query) {
    const int64_t first = static_cast<int64_t>(query) * item.kv_len;
    bytes = p.mask + (p.mask_indptr == nullptr ? 0 : p.mask_indptr[item.request]) + first / 8;
    shift = first % 8;
  }

  __device__ bool sees(int32_t key) const {
    const uint32_t bit = shift + key;
    return bytes[bit / 8] >> (bit % 8) & 1;
  }
};

// Whether any row of a tile sees a key before the end of its piece.
__device__ inline bool is_seen(const AttentionParams& p, const QueryRows& queries, int32_t key, int32_t tile_rows) {
  const int32_t first = queries.query(0);
  if (p.mask == nullptr) return key >= window_begin(p, queries, first);
  const int32_t last = min(queries.query(tile_rows - 1), queries.item.q_len - 1);
  for (int32_t query = first; query <= last && key >= window_begin(p, queries, query); ++query) {
    if (MaskRow(p, queries.item, query).sees(key)) return true;
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

// tanh with an error below 2^-22; the hardware's is 2^-11, too much beside a large cap.
__device__ inline float tanh_accurate(float x) {
  return fmaf(-2.0f, reciprocal_approx(exp2_approx(2.0f * kLog2e * x) + 1.0f), 1.0f);
}

// Whether logits are more than scaled products.
__device__ inline bool changes_logits(const AttentionParams& p) { return p.alibi || p.logits_soft_cap > 0.0f; }

// Turn the products of two rows (`row` and `row + 8` of the tile) and this lane's keys into logits in base 2.
template <int kKeyBlocks>
__device__ void change_logits(const AttentionParams& p, const QueryRows& queries, Accumulator (&s)[kKeyBlocks], int row,
                              int32_t first_key, int lane, float scale) {
  for (Accumulator& block : s) {
    for (float& x : block.x) x *= scale;
  }
  if (p.alibi) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float slope = kLog2e * alibi_slope(queries.head(row + 8 * half), p.kv_heads * p.group);
      const int32_t distance = first_key + lane % 4 * 2 - queries.position(queries.query(row + 8 * half));
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
      for (float& x : block.x) x = cap * tanh_accurate(x * inverse);
    }
  }
}

// As `mask_scores`, for keys before a window or hidden by the mask's bits. Bits of rows and keys that do not exist are
// not read.
template <int kKeyBlocks>
__device__ void mask_more(const AttentionParams& p, const QueryRows& queries, Accumulator (&s)[kKeyBlocks], int row,
                          int32_t first_key, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t query = queries.query(row + 8 * half);
    const int32_t begin = window_begin(p, queries, query);
    const int32_t end = p.mask != nullptr && queries.exists(row + 8 * half) ? queries.item.kv_end : 0;
    const MaskRow mask(p, queries.item, query);
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t key = first_key + block * 8 + lane % 4 * 2 + i;
        if (key < begin || (key < end && !mask.sees(key))) s[block].x[2 * half + i] = negative_infinity();
      }
    }
  }
}

}  // namespace attention
}  // namespace flashinfer
