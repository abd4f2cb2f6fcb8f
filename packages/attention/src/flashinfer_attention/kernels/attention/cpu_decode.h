// Decode: few query rows against many keys, as fast as memory delivers them.
//
// A tile holds the rows of all heads, in blocks of up to four that share a KV head: a row of K or V is converted once
// for its block. Scores come from dot products; a vector of them holds a block's rows for consecutive keys. Each line
// of memory is read once, in order, and fetched a step ahead by the arithmetic on the line that it follows.
#pragma once

#include "attention/cpu_stream.h"

namespace flashinfer {
namespace attention {

// Rows of one query and one KV head. `width`, their number with padding, is 1, 2 or 4.
struct RowBlock {
  int32_t row;  // in the tile
  int32_t rows;
  int32_t width;
  int32_t slot;  // of its first row among the padded rows of all blocks
  int32_t kv_head;
  int32_t seen;  // keys that its query sees
};

template <class T>
class DecodeTile {
 public:
  static constexpr int32_t kRows = 64;

  explicit DecodeTile(const AttentionParams& p) : p_(p), stride_(round_up(p.head_dim, simd::kLanes)) {}

  void start(const KeyStep& step) {
    set_blocks(step);
    for (int32_t i = 0; i < num_blocks_; ++i) {
      const RowBlock& b = blocks_[i];
      simd::store(maximum_ + i * simd::kLanes, simd::splat(-kInfinity));
      simd::store(sum_ + i * simd::kLanes, Floats{});
      for (int32_t r = 0; r < b.width; ++r) load_query(step, b, r);
    }
  }

  // Add the keys of `step` while fetching those of `ahead`, both in the order of memory.
  void run(const KeyStep& step, const KeyStep& ahead) {
    for (int32_t key = 0; key < step.keys.count; key += span_) {
      for (int32_t i = 0; i < num_blocks_; ++i) {
        by_width(blocks_[i], [&](auto width) { multiply_keys<width>(step, ahead, blocks_[i], key); });
      }
    }
    for (int32_t i = 0; i < num_blocks_; ++i) {
      by_width(blocks_[i], [&](auto width) { softmax<width>(step, i); });
    }
    for (int32_t key = 0; key < step.keys.count; key += kValueKeys) {
      for (int32_t i = 0; i < num_blocks_; ++i) {
        by_width(blocks_[i], [&](auto width) { add_values<width>(step, ahead, blocks_[i], key); });
      }
    }
  }

  void finish(const KeyStep& step) {
    const int32_t heads = p_.kv_heads * p_.group;
    for (int32_t i = 0; i < num_blocks_; ++i) {
      const RowBlock& b = blocks_[i];
      for (int32_t r = 0; r < b.rows; ++r) {
        float sum = 0;
        for (int32_t lane = r; lane < simd::kLanes; lane += b.width) sum += sum_[i * simd::kLanes + lane];
        float* o = o_ + (b.slot + r) * stride_;
        simd::restore_order(o, p_.head_dim, T{});
        const QueryRow row(step.item, step.item.row_begin + b.row + r, heads);
        write_row<T>(p_, step.item, b.row + r, row, o, maximum_[i * simd::kLanes + r], sum);
      }
    }
  }

 private:
  using Floats = simd::Floats;
  static constexpr int32_t kPaddedRows = 88;                         // 64 rows in blocks of three
  static constexpr int32_t kSums = simd::kRegisters == 32 ? 16 : 8;  // accumulators
  static constexpr int32_t kPair = 2 * simd::kLanes;
  static constexpr int32_t kLine = larger(kPair, kLineBytes / int32_t(sizeof(T)));  // elements between prefetches
  static constexpr int32_t kValueKeys = 4;                                          // that are added to O at a time
  static constexpr int32_t kValueRows = simd::kRegisters == 32 ? 4 : 2;             // likewise
  static_assert(kStepKeys % kSums == 0 && kSums % simd::kLanes == 0, "scores are whole vectors");

  const AttentionParams& p_;
  int32_t stride_;  // between rows of q_ and o_
  int32_t num_blocks_;
  int32_t span_;  // keys that are multiplied with a block before the next block's turn
  RowBlock blocks_[kRows];
  alignas(64) float q_[kPaddedRows * kMaxHeadDim];  // times sm_scale * log2(e)
  alignas(64) float o_[kPaddedRows * kMaxHeadDim];
  alignas(64) float s_[kPaddedRows * kStepKeys];     // of a block: [key, row]; scores, then probabilities
  alignas(64) float maximum_[kRows * simd::kLanes];  // of a block: a vector, lane i for row i % width
  alignas(64) float sum_[kRows * simd::kLanes];      // likewise, still to be added over lanes of the same row

  template <int32_t kWidth>
  using Width = std::integral_constant<int32_t, kWidth>;

  template <class Function>
  static void by_width(const RowBlock& b, Function&& function) {
    if (b.width == 4) return function(Width<4>{});
    if (b.width == 2) return function(Width<2>{});
    function(Width<1>{});
  }

  void set_blocks(const KeyStep& step) {
    const int32_t heads = p_.kv_heads * p_.group;
    num_blocks_ = 0;
    span_ = kSums / 4;
    for (int32_t row = 0, slot = 0; row < step.rows;) {
      const QueryRow at(step.item, step.item.row_begin + row, heads);
      const int32_t same_head = p_.group - at.head % p_.group;
      const int32_t rows = smaller(4, smaller(same_head, step.rows - row));
      const int32_t width = rows == 3 ? 4 : rows;
      blocks_[num_blocks_++] = {row, rows, width, slot, at.head / p_.group, keys_seen(p_, step.item, at.query)};
      span_ = larger(span_, kSums / width);
      row += rows;
      slot += width;
    }
  }

  void load_query(const KeyStep& step, const RowBlock& b, int32_t r) {
    const int32_t row = step.item.row_begin + b.row + smaller(r, b.rows - 1);
    const QueryRow at(step.item, row, p_.kv_heads * p_.group);
    const T* from = static_cast<const T*>(p_.q) + at.token * p_.q_stride_token + at.head * p_.q_stride_head;
    float* q = q_ + (b.slot + r) * stride_;
    float* o = o_ + (b.slot + r) * stride_;
    simd::widen_row_paired(q, from, p_.head_dim);
    for (int32_t d = 0; d < stride_; ++d) {
      q[d] *= p_.sm_scale * kLog2E;
      o[d] = 0;
    }
  }

  // Keys of this step that a block sees.
  static int32_t visible(const KeyStep& step, const RowBlock& b) {
    return clamp(b.seen - step.begin, 0, step.keys.count);
  }

  // S of span_ keys from `key` on, kSums dot products at a time.
  template <int32_t kWidth>
  void multiply_keys(const KeyStep& step, const KeyStep& ahead, const RowBlock& b, int32_t key) {
    constexpr int32_t kKeys = kSums / kWidth;
    const T* k = static_cast<const T*>(p_.k) + b.kv_head * p_.k_stride_head;
    const float* q = q_ + b.slot * stride_;
    float* s = s_ + b.slot * kStepKeys;
    const int32_t keys = visible(step, b);
    const int32_t stride = stride_;
    const int32_t head_dim = p_.head_dim;
    for (const int32_t end = smaller(key + span_, keys); key < end; key += kKeys) {
      const T* rows[kKeys];
      const T* next[kKeys];
      for (int32_t i = 0; i < kKeys; ++i) {
        rows[i] = k + step.keys.k[smaller(key + i, keys - 1)];
        next[i] = k + ahead.keys.k[key + i];
      }
      Floats dot[kSums] = {};
      int32_t d = 0;
      for (; d + kLine <= head_dim; d += kLine) {
        for (int32_t i = 0; i < kKeys; ++i) prefetch_line(next[i] + d);
        for (int32_t e = d; e < d + kLine; e += kPair) add_pairs<kWidth>(q + e, stride, rows, e, dot);
      }
      for (; d + kPair <= head_dim; d += kPair) add_pairs<kWidth>(q + d, stride, rows, d, dot);
      for (; d < head_dim; d += simd::kPart) add_part<kWidth>(q + d, stride, rows, d, dot);
      for (int32_t i = 0; i < kSums; i += simd::kLanes) simd::store(s + key * kWidth + i, simd::sums(dot + i));
    }
  }

  // Of the block's rows and the keys, the fewer stay in registers.
  template <int32_t kWidth>
  static void add_pairs(const float* q, int32_t stride, const T* const* rows, int32_t d, Floats* dot) {
    constexpr int32_t kKeys = kSums / kWidth;
    simd::Pair held[kWidth > kKeys ? kKeys : kWidth];
    if constexpr (kWidth > kKeys) {
      for (int32_t i = 0; i < kKeys; ++i) held[i] = simd::load_pair(rows[i] + d);
      for (int32_t r = 0; r < kWidth; ++r) {
        const simd::Pair x = simd::held(simd::load_pair(q + r * stride));
        for (int32_t i = 0; i < kKeys; ++i) dot[i * kWidth + r] = simd::fma(held[i], x, dot[i * kWidth + r]);
      }
    } else {
      for (int32_t r = 0; r < kWidth; ++r) held[r] = simd::held(simd::load_pair(q + r * stride));
      for (int32_t i = 0; i < kKeys; ++i) {
        const simd::Pair x = simd::load_pair(rows[i] + d);
        for (int32_t r = 0; r < kWidth; ++r) dot[i * kWidth + r] = simd::fma(held[r], x, dot[i * kWidth + r]);
      }
    }
  }

  template <int32_t kWidth>
  static void add_part(const float* q, int32_t stride, const T* const* rows, int32_t d, Floats* dot) {
    for (int32_t i = 0; i < kSums; ++i) {
      const Floats x = simd::load<simd::kPart>(rows[i / kWidth] + d);
      dot[i] = simd::fma(x, simd::load<simd::kPart>(q + i % kWidth * stride), dot[i]);
    }
  }

  // The last vector may hold scores of more keys than there are.
  static void hide_padding(float* s, int32_t count) {
    const int32_t whole = count / simd::kLanes * simd::kLanes;
    if (whole == count) return;
    const Floats last = simd::load(s + whole);
    simd::store(s + whole, simd::lane_numbers() < count - whole ? last : simd::splat(-kInfinity));
  }

  // P = exp2(S - m'); what was summed before is rescaled by exp2(m - m').
  template <int32_t kWidth>
  void softmax(const KeyStep& step, int32_t block) {
    const RowBlock& b = blocks_[block];
    float* s = s_ + b.slot * kStepKeys;
    const int32_t count = visible(step, b) * kWidth;
    const Floats before = simd::load(maximum_ + block * simd::kLanes);
    Floats m = before;
    hide_padding(s, count);
    for (int32_t i = 0; i < count; i += simd::kLanes) m = simd::maximum(m, simd::load(s + i));
    m = simd::maximum_over<kWidth>(m);
    const Floats base = m == -kInfinity ? Floats{} : m;  // a row that has seen nothing: exp2(-inf - 0) = 0
    const Floats rescale = simd::exp2(before - base);
    Floats sum = simd::load(sum_ + block * simd::kLanes) * rescale;
    for (int32_t i = 0; i < count; i += simd::kLanes) {
      const Floats probability = simd::exp2(simd::load(s + i) - base);
      simd::store(s + i, probability);
      sum += probability;
    }
    for (int32_t r = 0; r < kWidth; ++r) {
      if (rescale[r] != 1) scale_row(o_ + (b.slot + r) * stride_, rescale[r]);
    }
    simd::store(maximum_ + block * simd::kLanes, m);
    simd::store(sum_ + block * simd::kLanes, sum);
  }

  void scale_row(float* row, float scale) const {
    for (int32_t d = 0; d < stride_; d += simd::kLanes) simd::store(row + d, simd::load(row + d) * scale);
  }

  // O += P V for kValueKeys keys from `key` on.
  template <int32_t kWidth>
  void add_values(const KeyStep& step, const KeyStep& ahead, const RowBlock& b, int32_t key) {
    constexpr int32_t kRows = kWidth < kValueRows ? kWidth : kValueRows;
    const T* v = static_cast<const T*>(p_.v) + b.kv_head * p_.v_stride_head;
    const int32_t end = smaller(key + kValueKeys, visible(step, b));
    const T* next[kValueKeys];
    const T* rows[kValueKeys];
    for (int32_t i = 0; i < kValueKeys; ++i) {
      rows[i] = v + step.keys.v[key + i];
      next[i] = v + ahead.keys.v[key + i];
    }
    for (int32_t r = 0; r < kWidth; r += kRows) {
      const float* probability = s_ + b.slot * kStepKeys + key * kWidth + r;
      float* o = o_ + (b.slot + r) * stride_;
      if (end - key == kValueKeys) {
        add_rows<kWidth, kRows, kValueKeys>(o, probability, rows, next + r * kValueKeys / kWidth);
      } else {
        for (int32_t i = 0; i < end - key; ++i) {
          add_rows<kWidth, kRows, 1>(o, probability + i * kWidth, rows + i, next + i);
        }
      }
    }
  }

  // Every pass over the same keys, for other rows, fetches its share of the next keys.
  template <int32_t kWidth, int32_t kRows, int32_t kKeys>
  void add_rows(float* o, const float* probability, const T* const* rows, const T* const* next) {
    constexpr int32_t kFetched = kKeys * kRows < kWidth ? 1 : kKeys * kRows / kWidth;
    const int32_t stride = stride_;
    const int32_t head_dim = p_.head_dim;
    Floats p[kKeys][kRows];
    for (int32_t i = 0; i < kKeys; ++i) {
      for (int32_t r = 0; r < kRows; ++r) p[i][r] = simd::held(simd::splat(probability[i * kWidth + r]));
    }
    const auto add_pair = [&](int32_t d) {
      simd::Pair sum[kRows];
      for (int32_t r = 0; r < kRows; ++r)
        sum[r] = {simd::load(o + r * stride + d), simd::load(o + r * stride + d + simd::kLanes)};
      for (int32_t i = 0; i < kKeys; ++i) {
        const simd::Pair x = simd::held(simd::load_pair(rows[i] + d));
        for (int32_t r = 0; r < kRows; ++r) {
          sum[r] = {simd::fma(p[i][r], x.first, sum[r].first), simd::fma(p[i][r], x.second, sum[r].second)};
        }
      }
      for (int32_t r = 0; r < kRows; ++r) simd::store_pair(o + r * stride + d, sum[r]);
    };
    int32_t d = 0;
    for (; d + kLine <= head_dim; d += kLine) {
      for (int32_t i = 0; i < kFetched; ++i) prefetch_line(next[i] + d);
      for (int32_t e = d; e < d + kLine; e += kPair) add_pair(e);
    }
    for (; d + kPair <= head_dim; d += kPair) add_pair(d);
    for (; d < head_dim; d += simd::kPart) {
      for (int32_t r = 0; r < kRows; ++r) {
        float* to = o + r * stride + d;
        Floats sum = simd::load<simd::kPart>(to);
        for (int32_t i = 0; i < kKeys; ++i) sum = simd::fma(p[i][r], simd::load<simd::kPart>(rows[i] + d), sum);
        simd::store<simd::kPart>(to, sum);
      }
    }
  }
};

template <class T>
void decode(const AttentionParams& p, const WorkerItems& items) {
  KeyStream stream(p, items, DecodeTile<T>::kRows, p.head_dim * int32_t(sizeof(T)));
  DecodeTile<T> tile(p);
  KeyStep steps[2] = {};
  bool more = stream.next(steps[0]);
  for (int32_t i = 0; more; i ^= 1) {
    const KeyStep& step = steps[i];
    more = stream.next(steps[i ^ 1]);
    if (step.first) tile.start(step);
    tile.run(step, steps[i ^ 1]);
    if (step.last) tile.finish(step);
  }
}

}  // namespace attention
}  // namespace flashinfer
