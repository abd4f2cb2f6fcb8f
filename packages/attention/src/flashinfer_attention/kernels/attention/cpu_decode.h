// Decode: few query rows against many keys, as fast as memory delivers them.
//
// A tile holds the rows of all heads, in blocks of up to four that share a KV head. Scores come from dot products; a
// vector of them holds a block's rows for consecutive keys. Blocks take turns of some keys, so that each line of memory
// is read once and in order; those that come kAheadBytes later are fetched meanwhile.
#pragma once

#include "attention/cpu_products.h"
#include "attention/cpu_rotated_keys.h"
#include "attention/cpu_scores.h"
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
  int32_t begin, end;  // keys that causality and window leave to its query
};

// T: of q and o, TKv: of K and V.
template <class T, class TKv>
class DecodeTile {
 public:
  static constexpr int32_t kRows = 64;

  explicit DecodeTile(const AttentionParams& p)
      : p_(p),
        stride_(round_up(p.head_dim, simd::kLanes)),
        stride_vo_(round_up(p.head_dim_vo, simd::kLanes)),
        distance_(clamp(kAheadBytes / (p.kv_heads * p.head_dim * int32_t(sizeof(TKv))), 1, kStepKeys)),
        rotated_(p) {}

  void start(const KeyStep& step) {
    set_blocks(step);
    for (int32_t i = 0; i < num_blocks_; ++i) {
      const RowBlock& b = blocks_[i];
      simd::store(maximum_ + i * simd::kLanes, simd::splat(-kInfinity));
      simd::store(sum_ + i * simd::kLanes, Floats{});
      for (int32_t r = 0; r < b.width; ++r) load_query(step, i, r);
    }
  }

  // Add the keys of `step` and fetch some of `ahead`.
  void run(const KeyStep& step, const KeyStep& ahead) {
    for (int32_t key = 0; key < step.keys.count; key += kTurnKeys) {
      if (rotated_.active()) rotated_.seek(step.begin + key);
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
        float* o = o_ + (b.slot + r) * stride_vo_;
        simd::restore_order(o, p_.head_dim_vo, TKv{});
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
  int32_t stride_, stride_vo_;  // between rows of q_ and of o_
  int32_t distance_;            // keys between what is used and what is fetched
  int32_t num_blocks_;
  RowBlock blocks_[kRows];
  RowLanes lanes_[kRows];
  RotatedKeys<kTurnKeys> rotated_;
  alignas(64) float q_[kPaddedRows * kMaxHeadDim];  // scaled for scores in base 2
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
      blocks_[num_blocks_++] = {row,
                                rows,
                                width,
                                slot,
                                at.head / p_.group,
                                first_seen(p_, step.item, at.query),
                                keys_seen(p_, step.item, at.query)};
      row += rows;
      slot += width;
    }
  }

  void load_query(const KeyStep& step, int32_t block, int32_t r) {
    const RowBlock& b = blocks_[block];
    const int32_t row = step.item.row_begin + b.row + smaller(r, b.rows - 1);
    const QueryRow at(step.item, row, p_.kv_heads * p_.group);
    const T* from = static_cast<const T*>(p_.q) + at.token * p_.q_stride_token + at.head * p_.q_stride_head;
    float* q = q_ + (b.slot + r) * stride_;
    float* o = o_ + (b.slot + r) * stride_vo_;
    simd::widen_row(q, from, p_.head_dim);
    if (rotated_.active()) {
      rotated_.turn_query(q, step.item.kv_len - step.item.q_len + at.query);
    } else {
      simd::pair_order(q, p_.head_dim, TKv{});
    }
    const float scale = score_scale(p_, b.kv_head);
    for (int32_t d = 0; d < p_.head_dim; ++d) q[d] *= scale;
    for (int32_t d = 0; d < stride_vo_; ++d) o[d] = 0;
    for (int32_t lane = r; lane < simd::kLanes; lane += b.width) lanes_[block].set(lane, p_, step.item, at);
  }

  // The first key of this step that a block sees, and the one after the last.
  static int32_t first(const KeyStep& step, const RowBlock& b) {
    return clamp(b.begin - step.begin, 0, step.keys.count);
  }
  static int32_t last(const KeyStep& step, const RowBlock& b) { return clamp(b.end - step.begin, 0, step.keys.count); }

  // Where K and V of a block's head begin.
  const TKv* head_k(const RowBlock& b) const { return static_cast<const TKv*>(p_.k) + b.kv_head * p_.k_stride_head; }
  const TKv* head_v(const RowBlock& b) const { return static_cast<const TKv*>(p_.v) + b.kv_head * p_.v_stride_head; }

  // S of kTurnKeys keys from `turn` on.
  template <int32_t kWidth>
  void multiply(const KeyStep& step, const RowBlock& b, int32_t turn) {
    constexpr int32_t kKeys = keys_at_once(kWidth);
    const int32_t begin = larger(turn, first(step, b));
    const int32_t end = smaller(turn + kTurnKeys, last(step, b));
    if (begin >= end) return;
    Rows<TKv, kTurnKeys> rows;
    locate_keys(step, b, turn, begin, end, rows);
    const float* q = q_ + b.slot * stride_;
    float* s = s_ + b.slot * kStepKeys + turn * kWidth;
    if (rotated_.active()) rotated_.turn(b.kv_head, rows.now, begin - turn, end - turn);
    for (int32_t i = (begin - turn) / kKeys * kKeys; turn + i < end; i += kKeys) {
      if (rotated_.active()) {
        Rows<float, kKeys> turned;
        for (int32_t j = 0; j < kKeys; ++j)
          turned.now[j] = turned.ahead[j] = rotated_.row(clamp(i + j, begin - turn, end - 1 - turn));
        multiply_keys<kWidth>(q, stride_, turned.now, turned.ahead, p_.head_dim, s + i * kWidth);
      } else {
        multiply_keys<kWidth>(q, stride_, rows.now + i, rows.ahead + i, p_.head_dim, s + i * kWidth);
      }
    }
  }

  // Keys of a turn; the nearest that a block sees in the place of one that it does not. After K of this step comes V.
  void locate_keys(const KeyStep& step, const RowBlock& b, int32_t turn, int32_t begin, int32_t end,
                   Rows<TKv, kTurnKeys>& rows) const {
    const TKv* k = head_k(b);
    const TKv* v = head_v(b);
    for (int32_t i = 0; i < kTurnKeys; ++i) {
      const int32_t later = turn + i + distance_ - step.keys.count;
      rows.now[i] = k + step.keys.k[clamp(turn + i, begin, end - 1)];
      rows.ahead[i] = later < 0 ? k + step.keys.k[turn + i + distance_] : v + step.keys.v[in_step(later)];
    }
  }

  static int32_t in_step(int32_t key) { return smaller(key, kStepKeys - 1); }

  // P = exp2(S - m'); what was summed before is rescaled by exp2(m - m').
  template <int32_t kWidth>
  void softmax(const KeyStep& step, int32_t block) {
    constexpr int32_t kVectorKeys = simd::kLanes / kWidth;
    const RowBlock& b = blocks_[block];
    const int32_t begin = first(step, b) / kVectorKeys;
    const int32_t end = ceil_div(last(step, b), kVectorKeys);
    if (begin >= end) return;
    float* s = s_ + b.slot * kStepKeys + begin * simd::kLanes;
    const ScoreVectors scores = {s, simd::kLanes, end - begin, step.begin + begin * kVectorKeys, kVectorKeys};
    if (changes_scores(p_)) lanes_[block].change(p_, scores);
    lanes_[block].hide(scores);
    const Floats before = simd::load(maximum_ + block * simd::kLanes);
    const Floats m = simd::maximum_over<kWidth>(simd::maximum(before, highest(scores)));
    const Floats base = m == -kInfinity ? Floats{} : m;  // a row that has seen nothing: exp2(-inf - 0) = 0
    const Floats rescale = simd::exp2(before - base);
    Floats sum = simd::load(sum_ + block * simd::kLanes) * rescale;
    for (int32_t i = 0; i < scores.count * simd::kLanes; i += simd::kLanes) {
      const Floats probability = simd::exp2(simd::load(s + i) - base);
      simd::store(s + i, probability);
      sum += probability;
    }
    for (int32_t r = 0; r < kWidth; ++r) {
      if (rescale[r] != 1) scale_row(o_ + (b.slot + r) * stride_vo_, rescale[r]);
    }
    simd::store(maximum_ + block * simd::kLanes, m);
    simd::store(sum_ + block * simd::kLanes, sum);
  }

  void scale_row(float* row, float scale) const {
    for (int32_t d = 0; d < stride_vo_; d += simd::kLanes) simd::store(row + d, simd::load(row + d) * scale);
  }

  // O += P V of kTurnKeys keys from `turn` on. After V of this step comes K of the next.
  template <int32_t kWidth>
  void add(const KeyStep& step, const KeyStep& ahead, const RowBlock& b, int32_t turn) {
    const TKv* k = head_k(b);
    const TKv* v = head_v(b);
    const int32_t end = smaller(turn + kTurnKeys, last(step, b));
    float weights[kTurnKeys * kWidth];
    Rows<TKv, kTurnKeys> rows;
    int32_t count = 0;
    for (int32_t key = larger(turn, first(step, b)); key < end; ++key) {
      const float* from = s_ + b.slot * kStepKeys + key * kWidth;
      if (p_.mask != nullptr && all_zero<kWidth>(from)) continue;  // what is masked may be no number
      const int32_t later = key + distance_ - step.keys.count;
      rows.now[count] = v + step.keys.v[key];
      rows.ahead[count] = later < 0 ? v + step.keys.v[key + distance_] : k + ahead.keys.k[in_step(later)];
      for (int32_t r = 0; r < kWidth; ++r) weights[count * kWidth + r] = from[r];
      ++count;
    }
    if (count > 0) add_values<kWidth>(o_ + b.slot * stride_vo_, stride_vo_, weights, rows, count, p_.head_dim_vo);
  }

  template <int32_t kWidth>
  static bool all_zero(const float* x) {
    for (int32_t r = 0; r < kWidth; ++r) {
      if (x[r] != 0) return false;
    }
    return true;
  }
};

template <class T, class TKv>
void decode(const AttentionParams& p, const WorkerItems& items) {
  KeyStream stream(p, items, DecodeTile<T, TKv>::kRows);
  DecodeTile<T, TKv> tile(p);
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
