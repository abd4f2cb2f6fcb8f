// Attention of a tile of 96 packed rows of one KV head, as two register-blocked fp32 products.
//
// Scores are kept transposed, S^T = K Q^T: a vector holds one key's scores for kLanes rows, so the softmax needs no
// sum across lanes, and both products are "broadcast a column of one side, load vectors of the other".
#pragma once

#include "attention/cpu_rope.h"
#include "attention/cpu_scores.h"

namespace flashinfer {
namespace attention {

template <class T, class TKv>
class PrefillTile {
 public:
  using Floats = simd::Floats;
  static constexpr int32_t kRows = 96;
  static constexpr int32_t kKeys = 96;

  explicit PrefillTile(const AttentionParams& p) : p_(p), rotation_(p) {}

  void run(const WorkItem& item) {
    start(item);
    const TKv* k = static_cast<const TKv*>(p_.k) + item.kv_head * p_.k_stride_head;
    const TKv* v = static_cast<const TKv*>(p_.v) + item.kv_head * p_.v_stride_head;
    for (begin_ = item.kv_begin; begin_ < item.kv_end; begin_ += kKeys) {
      keys_.locate(p_, item.kv_start, begin_, smaller(begin_ + kKeys, item.kv_end));
      pack(k, keys_.k, p_.head_dim);
      if (rotation_.active()) rotate_keys();
      for (int32_t row = 0; row < rows_; row += kPanel) add_scores(row);
      pack(v, keys_.v, p_.head_dim_vo);
      for (int32_t row = 0; row < rows_; row += kBlock) add_values(row);
    }
    finish(item);
  }

 private:
  // Registers hold kBlock x 2 accumulators; the operands take the rest.
  static constexpr int32_t kBlock = simd::kRegisters == 32 ? 12 : 6;
  static constexpr int32_t kPanel = 2 * simd::kLanes;
  // One line more than the longest row: rows at a power of two apart would share few sets of the cache.
  static constexpr int32_t kStride = kMaxHeadDim + 16;
  static_assert(kRows % kBlock == 0 && kRows % kPanel == 0 && kKeys % kBlock == 0, "blocks fill the tile");

  const AttentionParams& p_;
  Rotation rotation_;
  alignas(64) float q_[kMaxHeadDim * kRows];  // [head_dim, row]
  alignas(64) float s_[kKeys * kRows];        // [key, row]: scores, then probabilities
  alignas(64) float kv_[kKeys * kStride];     // [key, head_dim]: keys, then values
  alignas(64) float o_[kRows * kStride];      // [row, head_dim_vo]
  alignas(64) float maximum_[kRows];
  alignas(64) float sum_[kRows];
  alignas(64) float rescale_[kRows];
  RowLanes lanes_[kRows / simd::kLanes];
  RowKeys<kRows> seen_;
  KeyRows<kKeys> keys_;
  float scale_;
  int32_t begin_;  // first key of the tile
  int32_t rows_;

  // Dimensions that only fill up blocks are zero, and so are rows of o; other rows repeat the last one.
  void start(const WorkItem& item) {
    rows_ = smaller(kRows, item.q_len * p_.group - item.row_begin);
    scale_ = score_scale(p_, item.kv_head);
    alignas(64) float values[kStride];
    for (int32_t i = 0; i < round_up(rows_, kPanel); ++i) {
      const QueryRow at(item, smaller(item.row_begin + i, item.row_begin + rows_ - 1), p_.group);
      const T* from = static_cast<const T*>(p_.q) + at.token * p_.q_stride_token + at.head * p_.q_stride_head;
      simd::widen_row(values, from, p_.head_dim);
      if (rotation_.active()) {
        rotation_.seek(item.kv_len - item.q_len + at.query);
        rotation_.turn(values);
      }
      for (int32_t d = 0; d < p_.head_dim; ++d) q_[d * kRows + i] = values[d];
      lanes_[i / simd::kLanes].set(i % simd::kLanes, p_, item, at);
      seen_.set(i, p_, item, at.query);
      maximum_[i] = -kInfinity;
      sum_[i] = 0;
    }
    for (int32_t i = 0; i < round_up(rows_, kBlock); ++i) {
      for (int32_t d = 0; d < round_up(p_.head_dim_vo, kPanel); ++d) o_[i * kStride + d] = 0;
    }
  }

  void pack(const TKv* from, const int64_t* offsets, int32_t dim) {
    const int32_t padded = round_up(dim, kPanel);
    for (int32_t key = 0; key < keys_.count; ++key) {
      float* to = kv_ + key * kStride;
      simd::widen_row(to, from + offsets[key], dim);
      for (int32_t d = dim; d < padded; ++d) to[d] = 0;
    }
    for (int32_t key = keys_.count; key < round_up(keys_.count, kBlock); ++key) {
      for (int32_t d = 0; d < padded; ++d) kv_[key * kStride + d] = 0;
    }
  }

  void rotate_keys() {
    rotation_.seek(begin_);
    for (int32_t key = 0; key < keys_.count; ++key, rotation_.advance()) rotation_.turn(kv_ + key * kStride);
  }

  // Keys of this tile before the first and after the last one that a row may see.
  int32_t first(int32_t row) const { return clamp(seen_.begin[row] - begin_, 0, keys_.count); }
  int32_t last(int32_t row) const { return clamp(seen_.end[row] - begin_, 0, keys_.count); }

  void add_scores(int32_t row) {
    const int32_t begin = first(row) / kBlock * kBlock;
    const int32_t end = last(row + kPanel - 1);
    for (int32_t key = begin; key < end; key += kBlock) multiply_keys(key, row);
    softmax(row, begin, end);
    softmax(row + simd::kLanes, begin, end);
  }

  // S^T[key .. key + kBlock, row .. row + kPanel] = K Q^T, scaled last, so that products of 16-bit numbers stay exact
  void multiply_keys(int32_t key, int32_t row) {
    const float* k = kv_ + key * kStride;
    const float* q = q_ + row;
    const int32_t dim = p_.head_dim;
    Floats s[kBlock][2] = {};
    for (int32_t d = 0; d < dim; ++d, ++k, q += kRows) {
      const Floats q0 = simd::load(q);
      const Floats q1 = simd::load(q + simd::kLanes);
      for (int32_t i = 0; i < kBlock; ++i) {
        const Floats x = simd::splat(k[i * kStride]);
        s[i][0] = simd::fma(x, q0, s[i][0]);
        s[i][1] = simd::fma(x, q1, s[i][1]);
      }
    }
    for (int32_t i = 0; i < kBlock; ++i) {
      simd::store(s_ + (key + i) * kRows + row, s[i][0] * scale_);
      simd::store(s_ + (key + i) * kRows + row + simd::kLanes, s[i][1] * scale_);
    }
  }

  // Turn the scores of kLanes rows into probabilities relative to a new maximum: P = exp2(S - m'). Others are zero.
  void softmax(int32_t row, int32_t begin, int32_t end) {
    float* s = s_ + row;
    const RowLanes& lanes = lanes_[row / simd::kLanes];
    const ScoreVectors scores = {s + begin * kRows, kRows, larger(end - begin, 0), begin_ + begin, 1};
    if (changes_scores(p_)) lanes.change(p_, scores);
    lanes.hide(scores);
    const Floats before = simd::load(maximum_ + row);
    const Floats m = simd::maximum(before, highest(scores));
    const Floats base = m == -kInfinity ? Floats{} : m;  // a row that has seen nothing: exp2(-inf - 0) = 0
    Floats sum{};
    for (int32_t key = 0; key < begin; ++key) simd::store(s + key * kRows, Floats{});
    for (int32_t key = begin; key < end; ++key) {
      const Floats probability = simd::exp2(simd::load(s + key * kRows) - base);
      simd::store(s + key * kRows, probability);
      sum += probability;
    }
    for (int32_t key = larger(begin, end); key < keys_.count; ++key) simd::store(s + key * kRows, Floats{});
    const Floats rescale = simd::exp2(before - base);
    simd::store(rescale_ + row, rescale);
    simd::store(sum_ + row, simd::fma(simd::load(sum_ + row), rescale, sum));
    simd::store(maximum_ + row, m);
  }

  // O[row .. row + kBlock] = O * rescale + P V
  void add_values(int32_t row) {
    const int32_t begin = first(row);
    const int32_t end = last(smaller(row + kBlock, rows_) - 1);
    if (begin >= end) return;
    for (int32_t d = 0; d < p_.head_dim_vo; d += kPanel) {
      const float* p = s_ + begin * kRows + row;
      const float* v = kv_ + begin * kStride + d;
      float* o = o_ + row * kStride + d;
      Floats sum[kBlock][2];
      for (int32_t i = 0; i < kBlock; ++i) {
        sum[i][0] = simd::load(o + i * kStride) * rescale_[row + i];
        sum[i][1] = simd::load(o + i * kStride + simd::kLanes) * rescale_[row + i];
      }
      for (int32_t key = begin; key < end; ++key, p += kRows, v += kStride) {
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

  void finish(const WorkItem& item) {
    for (int32_t i = 0; i < rows_; ++i) {
      const QueryRow row(item, item.row_begin + i, p_.group);
      write_row<T>(p_, item, i, row, o_ + i * kStride, maximum_[i], sum_[i]);
    }
  }
};

}  // namespace attention
}  // namespace flashinfer
