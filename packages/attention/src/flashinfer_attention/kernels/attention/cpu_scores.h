// What the options make of scores, for the decode and the prefill tile alike. Scores are in base 2.
//
// They come as vectors whose lanes keep their rows: lane i of vector n has key `key + i / width + n * step`, where
// `width` rows share the lanes and step = kLanes / width. Prefill has kLanes rows and one key in a vector.
#pragma once

#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

// The first key that a window leaves to a query.
inline int32_t first_seen(const AttentionParams& p, const WorkItem& item, int32_t query) {
  const int32_t position = item.kv_len - item.q_len + query;
  return p.window_left < 0 || position < p.window_left ? 0 : position - p.window_left;
}

// The slope of a head's bias (Press et al., 2021, arXiv:2108.12409), in base 2: a geometric sequence, and for heads
// beyond a power of two every second of the one twice as long.
inline float alibi_slope(int32_t head, int32_t heads) {
  const int32_t power = 1 << (31 - __builtin_clz(uint32_t(heads)));
  const float exponent =
      head < power ? -8.f * float(head + 1) / float(power) : -4.f * float(2 * (head - power) + 1) / float(power);
  return kLog2E * std::exp2(exponent);
}

// The keys that causality and window leave to each row of a tile; both ends grow with the row.
template <int32_t kRows>
struct RowKeys {
  int32_t begin[kRows];
  int32_t end[kRows];

  void set(int32_t row, const AttentionParams& p, const WorkItem& item, int32_t query) {
    begin[row] = first_seen(p, item, query);
    end[row] = keys_seen(p, item, query);
  }
};

struct ScoreVectors {
  float* s;
  int32_t stride;  // floats from vector to vector
  int32_t count;
  int32_t key;  // of lane 0 of the first vector
  int32_t step;

  simd::Ints keys() const { return key + simd::lane_numbers() / (simd::kLanes / step); }
};

// The highest score of each lane. Four chains, because a maximum takes as many cycles.
inline simd::Floats highest(const ScoreVectors& scores) {
  simd::Floats m[4];
  for (simd::Floats& x : m) x = simd::splat(-kInfinity);
  int32_t i = 0;
  for (; i + 4 <= scores.count; i += 4) {
    for (int32_t j = 0; j < 4; ++j) m[j] = simd::maximum(m[j], simd::load(scores.s + (i + j) * scores.stride));
  }
  for (; i < scores.count; ++i) m[0] = simd::maximum(m[0], simd::load(scores.s + i * scores.stride));
  return simd::maximum(simd::maximum(m[0], m[1]), simd::maximum(m[2], m[3]));
}

inline bool changes_scores(const AttentionParams& p) { return p.alibi || p.logits_soft_cap > 0; }

// The rows that the lanes of a vector belong to.
class RowLanes {
 public:
  // All lanes have to be set, the first one first.
  void set(int32_t lane, const AttentionParams& p, const WorkItem& item, const QueryRow& row) {
    const int32_t end = keys_seen(p, item, row.query);
    const int32_t begin = first_seen(p, item, row.query);
    begin_[lane] = begin;
    end_[lane] = end;
    position_[lane] = item.kv_len - item.q_len + row.query;
    if (p.alibi) slope_[lane] = alibi_slope(row.head, p.kv_heads * p.group);
    if (p.mask != nullptr) bit_[lane] = int64_t(row.query) * item.kv_len;
    all_begin_ = lane > 0 ? larger(all_begin_, begin) : begin;
    all_end_ = lane > 0 ? smaller(all_end_, end) : end;
    mask_ = p.mask == nullptr ? nullptr : p.mask + (p.mask_indptr == nullptr ? 0 : p.mask_indptr[item.request]);
    kv_len_ = item.kv_len;
  }

  // Add the bias and apply the soft cap.
  void change(const AttentionParams& p, const ScoreVectors& scores) const {
    if (p.alibi) add_bias(scores);
    if (p.logits_soft_cap > 0) cap(scores, p.logits_soft_cap);
  }

  // Set scores of keys that a row does not see to -inf.
  void hide(const ScoreVectors& scores) const {
    const int32_t before = clamp(ceil_div(larger(all_begin_ - scores.key, 0), scores.step), 0, scores.count);
    const int32_t after = clamp(larger(all_end_ - scores.key, 0) / scores.step, before, scores.count);
    for (int32_t i = 0; i < before; ++i) hide_range(scores, i);
    for (int32_t i = after; i < scores.count; ++i) hide_range(scores, i);
    if (mask_ != nullptr) hide_masked(scores);
  }

 private:
  using Floats = simd::Floats;

  simd::Ints position_;
  simd::Ints begin_, end_;       // keys that causality and window leave to a row,
  int32_t all_begin_, all_end_;  // and to all of them
  Floats slope_;
  int64_t bit_[simd::kLanes];  // the row's first in the mask
  const uint8_t* mask_;        // of the request
  int32_t kv_len_;

  void add_bias(const ScoreVectors& scores) const {
    Floats distance = __builtin_convertvector(scores.keys() - position_, Floats);
    for (int32_t i = 0; i < scores.count; ++i, distance += float(scores.step)) {
      float* s = scores.s + i * scores.stride;
      simd::store(s, simd::fma(slope_, distance, simd::load(s)));
    }
  }

  // cap * tanh(x / cap), where tanh |y| = (1 - e) / (1 + e) with e = exp(-2 |y|).
  static void cap(const ScoreVectors& scores, float cap) {
    const Floats factor = simd::splat(-2 / cap);
    for (int32_t i = 0; i < scores.count; ++i) {
      float* s = scores.s + i * scores.stride;
      const Floats x = simd::load(s);
      const simd::Words sign = (simd::Words)x & 0x80000000u;
      const Floats e = simd::exp2((Floats)((simd::Words)x ^ sign) * factor);
      const Floats magnitude = (cap * kLog2E - cap * kLog2E * e) * simd::reciprocal(1 + e);
      simd::store(s, (Floats)((simd::Words)magnitude | sign));
    }
  }

  void hide_range(const ScoreVectors& scores, int32_t i) const {
    float* s = scores.s + i * scores.stride;
    const simd::Ints key = scores.keys() + i * scores.step;
    simd::store(s, (key >= begin_) & (key < end_) ? simd::load(s) : simd::splat(-kInfinity));
  }

  void hide_masked(const ScoreVectors& scores) const {
    const simd::Words offset = (simd::Words)(scores.keys() - scores.key);
    for (int32_t i = 0; i < scores.count;) {
      const int32_t key = scores.key + i * scores.step;
      simd::Words bits;
      for (int32_t lane = 0; lane < simd::kLanes; ++lane)
        bits[lane] = mask_bits(mask_, bit_[lane] + key, smaller(32, kv_len_ - key));
      bits >>= offset;
      for (const int32_t end = smaller(i + 32 / scores.step, scores.count); i < end; ++i, bits >>= scores.step) {
        float* s = scores.s + i * scores.stride;
        simd::store(s, (bits & 1) != 0 ? simd::load(s) : simd::splat(-kInfinity));
      }
    }
  }

  // Up to 32 bits from bit `first` on; `count` of them exist, and no byte of others is read.
  static uint32_t mask_bits(const uint8_t* mask, int64_t first, int32_t count) {
    if (count <= 0) return 0;
    const uint8_t* bytes = mask + first / 8;
    const int32_t shift = int32_t(first % 8);
    uint64_t bits = 0;
    if (count == 32) {
      __builtin_memcpy(&bits, bytes, 4);
      if (shift > 0) bits |= uint64_t(bytes[4]) << 32;
      return uint32_t(bits >> shift);
    }
    for (int32_t i = 0; 8 * i < shift + count; ++i) bits |= uint64_t(bytes[i]) << 8 * i;
    return uint32_t(bits >> shift) & ((uint64_t(1) << count) - 1);
  }
};

}  // namespace attention
}  // namespace flashinfer
