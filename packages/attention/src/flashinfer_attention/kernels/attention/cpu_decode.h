// Decode: few query rows against many keys, as fast as memory delivers them.
//
// A tile holds the rows of all heads, in blocks of up to four that share a KV head: a row of K or V is converted once
// for its block. Scores come from dot products; a vector of them holds a block's rows for consecutive keys.
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

  // Add the keys of `step` while fetching those of `ahead`.
  void run(const KeyStep& step, const KeyStep& ahead) {
    RowPrefetch k_ahead(p_.k, ahead.keys.k, ahead, p_.k_stride_head, sizeof(T), p_.head_dim,
                        num_blocks_ * ceil_div(step.keys.count, kSums));
    for (int32_t key = 0; key < step.keys.count; key += kSums) {
      for (int32_t i = 0; i < num_blocks_; ++i) {
        k_ahead.advance();
        by_width(blocks_[i], [&](auto width) { multiply_keys<width>(step, blocks_[i], key); });
      }
    }
    RowPrefetch v_ahead(p_.v, ahead.keys.v, ahead, p_.v_stride_head, sizeof(T), p_.head_dim,
                        num_blocks_ * ceil_div(p_.head_dim * blocks_[0].width, kSums * simd::kLanes));
    for (int32_t i = 0; i < num_blocks_; ++i) {
      by_width(blocks_[i], [&](auto width) {
        softmax<width>(step, i);
        add_values<width>(step, blocks_[i], v_ahead);
      });
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
  static_assert(kStepKeys % kSums == 0 && kSums % simd::kLanes == 0, "scores are whole vectors");

  const AttentionParams& p_;
  int32_t stride_;  // between rows of q_ and o_
  int32_t num_blocks_;
  RowBlock blocks_[kRows];
  alignas(64) float q_[kPaddedRows * kMaxHeadDim];  // times sm_scale * log2(e)
  alignas(64) float o_[kPaddedRows * kMaxHeadDim];
  alignas(64) float s_[kPaddedRows * kStepKeys];     // of a block: [key, row]; scores, then probabilities
  alignas(64) float maximum_[kRows * simd::kLanes];  // of a block: a vector, lane i for row i % width
  alignas(64) float sum_[kRows * simd::kLanes];      // likewise, still to be added over lanes of the same row
  float rescale_[simd::kLanes];

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
    for (int32_t row = 0, slot = 0; row < step.rows;) {
      const QueryRow at(step.item, step.item.row_begin + row, heads);
      const int32_t same_head = p_.group - at.head % p_.group;
      const int32_t rows = smaller(4, smaller(same_head, step.rows - row));
      const int32_t width = rows == 3 ? 4 : rows;
      blocks_[num_blocks_++] = {row, rows, width, slot, at.head / p_.group, keys_seen(p_, step.item, at.query)};
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

  // S of kSums keys from `key` on, kSums dot products at a time.
  template <int32_t kWidth>
  void multiply_keys(const KeyStep& step, const RowBlock& b, int32_t key) {
    constexpr int32_t kKeys = kSums / kWidth;
    const T* k = static_cast<const T*>(p_.k) + b.kv_head * p_.k_stride_head;
    const float* q = q_ + b.slot * stride_;
    float* s = s_ + b.slot * kStepKeys;
    const int32_t keys = visible(step, b);
    const int32_t stride = stride_;
    const int32_t head_dim = p_.head_dim;
    for (const int32_t end = smaller(key + kSums, keys); key < end; key += kKeys) {
      const T* rows[kKeys];
      for (int32_t i = 0; i < kKeys; ++i) rows[i] = k + step.keys.k[smaller(key + i, keys - 1)];
      Floats dot[kSums] = {};
      int32_t d = 0;
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
    float* s = s_ + blocks_[block].slot * kStepKeys;
    const int32_t count = visible(step, blocks_[block]) * kWidth;
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
    simd::store(rescale_, rescale);
    simd::store(maximum_ + block * simd::kLanes, m);
    simd::store(sum_ + block * simd::kLanes, sum);
  }

  // O = O * rescale + P V, for as many dimensions at a time as there are accumulators.
  template <int32_t kWidth>
  void add_values(const KeyStep& step, const RowBlock& b, RowPrefetch& ahead) {
    constexpr int32_t kVectors = kSums / kWidth;
    constexpr int32_t kDims = kVectors * simd::kLanes;
    const int32_t keys = visible(step, b);
    int32_t d = 0;
    for (; d + kDims <= p_.head_dim; d += kDims) {
      ahead.advance();
      add_values<kWidth, kVectors>(step, b, d, keys);
    }
    for (; d + kPair <= p_.head_dim; d += kPair) add_values<kWidth, 2>(step, b, d, keys);
    for (; d < p_.head_dim; d += simd::kPart) add_values<kWidth, 1>(step, b, d, keys);
  }

  // kVectors are whole pairs, or 1 for kPart elements.
  template <int32_t kWidth, int32_t kVectors>
  void add_values(const KeyStep& step, const RowBlock& b, int32_t d, int32_t keys) {
    constexpr int32_t kCount = kVectors == 1 ? simd::kPart : simd::kLanes;
    const T* v = static_cast<const T*>(p_.v) + b.kv_head * p_.v_stride_head + d;
    const float* probability = s_ + b.slot * kStepKeys;
    float* o = o_ + b.slot * stride_ + d;
    Floats sum[kWidth][kVectors];
    for (int32_t r = 0; r < kWidth; ++r) {
      for (int32_t c = 0; c < kVectors; ++c) {
        sum[r][c] = simd::load<kCount>(o + r * stride_ + c * simd::kLanes) * rescale_[r];
      }
    }
    for (int32_t key = 0; key < keys; ++key, probability += kWidth) {
      const T* row = v + step.keys.v[key];
      Floats x[kVectors];
      if constexpr (kVectors == 1) {
        x[0] = simd::load<kCount>(row);
      } else {
        for (int32_t c = 0; c < kVectors; c += 2) {
          const simd::Pair pair = simd::load_pair(row + c * simd::kLanes);
          x[c] = pair.first;
          x[c + 1] = pair.second;
        }
      }
      for (int32_t r = 0; r < kWidth; ++r) {
        for (int32_t c = 0; c < kVectors; ++c) sum[r][c] = simd::fma(simd::splat(probability[r]), x[c], sum[r][c]);
      }
    }
    for (int32_t r = 0; r < kWidth; ++r) {
      for (int32_t c = 0; c < kVectors; ++c) simd::store<kCount>(o + r * stride_ + c * simd::kLanes, sum[r][c]);
    }
  }
};

template <class T>
void decode(const AttentionParams& p, const WorkerItems& items) {
  KeyStream stream(p, items, DecodeTile<T>::kRows, p.head_dim * int32_t(sizeof(T)));
  DecodeTile<T> tile(p);
  KeyStep steps[2];
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
