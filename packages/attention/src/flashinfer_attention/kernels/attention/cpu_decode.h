// Decode: few query rows against many keys, as fast as memory delivers them.
//
// A tile holds the rows of all heads, in blocks of up to four that share a KV head. Scores come from dot products; a
// vector of them holds a block's rows for consecutive keys. Blocks take turns of some keys, so that each line of memory
// is read once and in order; those that come kAheadBytes later are fetched meanwhile.
#pragma once

#include "attention/cpu_products.h"
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

  explicit DecodeTile(const AttentionParams& p)
      : p_(p),
        stride_(round_up(p.head_dim, simd::kLanes)),
        distance_(clamp(kAheadBytes / (p.kv_heads * p.head_dim * int32_t(sizeof(T))), 1, kStepKeys)) {}

  void start(const KeyStep& step) {
    set_blocks(step);
    for (int32_t i = 0; i < num_blocks_; ++i) {
      const RowBlock& b = blocks_[i];
      simd::store(maximum_ + i * simd::kLanes, simd::splat(-kInfinity));
      simd::store(sum_ + i * simd::kLanes, Floats{});
      for (int32_t r = 0; r < b.width; ++r) load_query(step, b, r);
    }
  }

  // Add the keys of `step` and fetch some of `ahead`.
  void run(const KeyStep& step, const KeyStep& ahead) {
    for (int32_t key = 0; key < step.keys.count; key += kTurnKeys) {
      for (int32_t i = 0; i < num_blocks_; ++i) {
        by_width(blocks_[i], [&](auto width) { multiply<width>(step, blocks_[i], key); });
      }
    }
    for (int32_t i = 0; i < num_blocks_; ++i) {
      by_width(blocks_[i], [&](auto width) { softmax<width>(step, i); });
    }
    for (int32_t key = 0; key < step.keys.count; key += kTurnKeys) {
      for (int32_t i = 0; i < num_blocks_; ++i) {
        by_width(blocks_[i], [&](auto width) { add<width>(step, ahead, blocks_[i], key); });
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
  static constexpr int32_t kPaddedRows = 88;  // 64 rows in blocks of three
  static constexpr int32_t kTurnKeys = 16;    // that a block takes before the next block's turn
  static constexpr int32_t kAheadBytes = 64 << 10;
  static_assert(kTurnKeys % keys_at_once(1) == 0 && kStepKeys % kTurnKeys == 0 && kSums % simd::kLanes == 0,
                "scores are whole vectors");

  const AttentionParams& p_;
  int32_t stride_;    // between rows of q_ and o_
  int32_t distance_;  // keys between what is used and what is fetched
  int32_t num_blocks_;
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

  // Where K and V of a block's head begin.
  const T* head_k(const RowBlock& b) const { return static_cast<const T*>(p_.k) + b.kv_head * p_.k_stride_head; }
  const T* head_v(const RowBlock& b) const { return static_cast<const T*>(p_.v) + b.kv_head * p_.v_stride_head; }

  // S of kTurnKeys keys from `key` on. After K of this step comes V.
  template <int32_t kWidth>
  void multiply(const KeyStep& step, const RowBlock& b, int32_t key) {
    constexpr int32_t kKeys = keys_at_once(kWidth);
    const T* k = head_k(b);
    const T* v = head_v(b);
    const int32_t keys = visible(step, b);
    for (const int32_t end = smaller(key + kTurnKeys, keys); key < end; key += kKeys) {
      Rows<T, kKeys> rows;
      for (int32_t i = 0; i < kKeys; ++i) {
        const int32_t later = key + i + distance_ - step.keys.count;
        rows.now[i] = k + step.keys.k[smaller(key + i, keys - 1)];
        rows.ahead[i] = later < 0 ? k + step.keys.k[key + i + distance_] : v + step.keys.v[in_step(later)];
      }
      multiply_keys<kWidth>(q_ + b.slot * stride_, stride_, rows, p_.head_dim, s_ + b.slot * kStepKeys + key * kWidth);
    }
  }

  static int32_t in_step(int32_t key) { return smaller(key, kStepKeys - 1); }

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

  // O += P V of kTurnKeys keys from `key` on. After V of this step comes K of the next.
  template <int32_t kWidth>
  void add(const KeyStep& step, const KeyStep& ahead, const RowBlock& b, int32_t key) {
    const T* k = head_k(b);
    const T* v = head_v(b);
    const int32_t keys = smaller(kTurnKeys, visible(step, b) - key);
    Rows<T, kTurnKeys> rows;
    for (int32_t i = 0; i < keys; ++i) {
      const int32_t later = key + i + distance_ - step.keys.count;
      rows.now[i] = v + step.keys.v[key + i];
      rows.ahead[i] = later < 0 ? v + step.keys.v[key + i + distance_] : k + ahead.keys.k[in_step(later)];
    }
    const float* probability = s_ + b.slot * kStepKeys + key * kWidth;
    if (keys > 0) add_values<kWidth>(o_ + b.slot * stride_, stride_, probability, rows, keys, p_.head_dim);
  }
};

template <class T>
void decode(const AttentionParams& p, const WorkerItems& items) {
  KeyStream stream(p, items, DecodeTile<T>::kRows);
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
