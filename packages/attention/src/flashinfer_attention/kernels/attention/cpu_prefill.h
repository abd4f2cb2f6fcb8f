// Attention of a tile of 96 packed rows of one KV head, as two register-blocked fp32 products.
//
// Scores are kept transposed, S^T = K Q^T: a vector holds one key's scores for kLanes rows, so the softmax needs no
// sum across lanes, and both products are "broadcast a column of one side, load vectors of the other".
#pragma once

#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

template <class T>
class PrefillTile {
 public:
  using Floats = simd::Floats;
  static constexpr int32_t kRows = 96;
  static constexpr int32_t kKeys = 96;

  void run(const AttentionParams& p, const WorkItem& item) {
    start(p, item);
    for (int32_t begin = item.kv_begin; begin < item.kv_end; begin += kKeys) {
      begin_ = begin;
      keys_.locate(p, item.kv_start, begin, smaller(begin + kKeys, item.kv_end));
      pack(static_cast<const T*>(p.k) + item.kv_head * p.k_stride_head, keys_.k);
      for (int32_t row = 0; row < rows_; row += kPanel) add_scores(row);
      pack(static_cast<const T*>(p.v) + item.kv_head * p.v_stride_head, keys_.v);
      for (int32_t row = 0; row < rows_; row += kBlock) add_values(row);
    }
    finish(p, item);
  }

 private:
  // Registers hold kBlock x 2 accumulators; the operands take the rest.
  static constexpr int32_t kBlock = simd::kRegisters == 32 ? 12 : 6;
  static constexpr int32_t kPanel = 2 * simd::kLanes;
  // One line more than a row of 256: rows at a power of two apart would share few sets of the cache.
  static constexpr int32_t kStride = kMaxHeadDim + 16;
  static_assert(kRows % kBlock == 0 && kRows % kPanel == 0 && kKeys % kBlock == 0, "blocks fill the tile");

  alignas(64) float q_[kMaxHeadDim * kRows];  // [head_dim, row], times sm_scale * log2(e)
  alignas(64) float s_[kKeys * kRows];        // [key, row]: scores, then probabilities
  alignas(64) float kv_[kKeys * kStride];     // [key, head_dim]: keys, then values
  alignas(64) float o_[kRows * kStride];      // [row, head_dim]
  alignas(64) float maximum_[kRows];
  alignas(64) float sum_[kRows];
  alignas(64) float rescale_[kRows];
  alignas(64) int32_t seen_[kRows];  // keys that a row sees; increases with the row
  KeyRows<kKeys> keys_;
  int32_t begin_;  // first key of the tile
  int32_t rows_;
  int32_t head_dim_;
  int32_t padded_dim_;

  // Rows and dimensions that only fill up blocks are zero.
  void start(const AttentionParams& p, const WorkItem& item) {
    rows_ = smaller(kRows, item.q_len * p.group - item.row_begin);
    head_dim_ = p.head_dim;
    padded_dim_ = round_up(head_dim_, kPanel);
    const float scale = p.sm_scale * kLog2E;
    alignas(64) float row[kStride];
    for (int32_t i = 0; i < round_up(rows_, kPanel); ++i) {
      const QueryRow at(item, smaller(item.row_begin + i, item.row_begin + rows_ - 1), p.group);
      const T* from = static_cast<const T*>(p.q) + at.token * p.q_stride_token + at.head * p.q_stride_head;
      simd::widen_row(row, from, head_dim_);
      for (int32_t d = 0; d < head_dim_; ++d) q_[d * kRows + i] = row[d] * scale;
      seen_[i] = keys_seen(p, item, at.query);
      maximum_[i] = -kInfinity;
      sum_[i] = 0;
    }
    for (int32_t i = 0; i < round_up(rows_, kBlock); ++i) {
      for (int32_t d = 0; d < padded_dim_; ++d) o_[i * kStride + d] = 0;
    }
  }

  void pack(const T* from, const int64_t* offsets) {
    for (int32_t key = 0; key < keys_.count; ++key) {
      float* to = kv_ + key * kStride;
      simd::widen_row(to, from + offsets[key], head_dim_);
      for (int32_t d = head_dim_; d < padded_dim_; ++d) to[d] = 0;
    }
    for (int32_t key = keys_.count; key < round_up(keys_.count, kBlock); ++key) {
      for (int32_t d = 0; d < padded_dim_; ++d) kv_[key * kStride + d] = 0;
    }
  }

  // Keys of this tile that a row sees.
  int32_t visible(int32_t row) const { return clamp(seen_[row] - begin_, 0, keys_.count); }

  void add_scores(int32_t row) {
    const int32_t keys = visible(row + kPanel - 1);
    for (int32_t key = 0; key < keys; key += kBlock) multiply_keys(key, row);
    softmax(row, keys);
    softmax(row + simd::kLanes, keys);
  }

  // S^T[key .. key + kBlock, row .. row + kPanel] = K Q^T
  void multiply_keys(int32_t key, int32_t row) {
    const float* k = kv_ + key * kStride;
    const float* q = q_ + row;
    Floats s[kBlock][2] = {};
    for (int32_t d = 0; d < head_dim_; ++d, ++k, q += kRows) {
      const Floats q0 = simd::load(q);
      const Floats q1 = simd::load(q + simd::kLanes);
      for (int32_t i = 0; i < kBlock; ++i) {
        const Floats x = simd::splat(k[i * kStride]);
        s[i][0] = simd::fma(x, q0, s[i][0]);
        s[i][1] = simd::fma(x, q1, s[i][1]);
      }
    }
    for (int32_t i = 0; i < kBlock; ++i) {
      simd::store(s_ + (key + i) * kRows + row, s[i][0]);
      simd::store(s_ + (key + i) * kRows + row + simd::kLanes, s[i][1]);
    }
  }

  // Turn the scores of kLanes rows into probabilities relative to a new maximum: P = exp2(S - m').
  void softmax(int32_t row, int32_t keys) {
    float* s = s_ + row;
    const Floats before = simd::load(maximum_ + row);
    Floats m = before;
    mask(row, keys);
    for (int32_t key = 0; key < keys; ++key) m = simd::maximum(m, simd::load(s + key * kRows));
    const Floats base = m == -kInfinity ? Floats{} : m;  // a row that has seen nothing: exp2(-inf - 0) = 0
    Floats sum{};
    for (int32_t key = 0; key < keys; ++key) {
      const Floats probability = simd::exp2(simd::load(s + key * kRows) - base);
      simd::store(s + key * kRows, probability);
      sum += probability;
    }
    for (int32_t key = keys; key < keys_.count; ++key) simd::store(s + key * kRows, Floats{});
    const Floats rescale = simd::exp2(before - base);
    simd::store(rescale_ + row, rescale);
    simd::store(sum_ + row, simd::fma(simd::load(sum_ + row), rescale, sum));
    simd::store(maximum_ + row, m);
  }

  void mask(int32_t row, int32_t keys) {
    simd::Ints seen;
    __builtin_memcpy(&seen, seen_ + row, sizeof(seen));
    for (int32_t key = visible(row); key < keys; ++key) {
      float* s = s_ + key * kRows + row;
      simd::store(s, begin_ + key < seen ? simd::load(s) : simd::splat(-kInfinity));
    }
  }

  // O[row .. row + kBlock] = O * rescale + P V
  void add_values(int32_t row) {
    const int32_t keys = visible(smaller(row + kBlock, rows_) - 1);
    if (keys == 0) return;
    for (int32_t d = 0; d < padded_dim_; d += kPanel) {
      const float* p = s_ + row;
      const float* v = kv_ + d;
      float* o = o_ + row * kStride + d;
      Floats sum[kBlock][2];
      for (int32_t i = 0; i < kBlock; ++i) {
        sum[i][0] = simd::load(o + i * kStride) * rescale_[row + i];
        sum[i][1] = simd::load(o + i * kStride + simd::kLanes) * rescale_[row + i];
      }
      for (int32_t key = 0; key < keys; ++key, p += kRows, v += kStride) {
        const Floats v0 = simd::load(v);
        const Floats v1 = simd::load(v + simd::kLanes);
        for (int32_t i = 0; i < kBlock; ++i) {
          const Floats x = simd::splat(p[i]);
          sum[i][0] = simd::fma(x, v0, sum[i][0]);
          sum[i][1] = simd::fma(x, v1, sum[i][1]);
        }
      }
      for (int32_t i = 0; i < kBlock; ++i) {
        simd::store(o + i * kStride, sum[i][0]);
        simd::store(o + i * kStride + simd::kLanes, sum[i][1]);
      }
    }
  }

  void finish(const AttentionParams& p, const WorkItem& item) {
    for (int32_t i = 0; i < rows_; ++i) {
      const QueryRow row(item, item.row_begin + i, p.group);
      write_row<T>(p, item, i, row, o_ + i * kStride, maximum_[i], sum_[i]);
    }
  }
};

}  // namespace attention
}  // namespace flashinfer
