// Attention of a tile of packed rows of one KV head in bf16, as two products of AMX tiles.
//
// Both results are kept transposed: S^T = K Q^T takes keys as they lie in memory, and P, rounded to bf16, is then the
// right operand of O^T = V^T P^T once two keys' probabilities are put side by side. What has to be transposed is V.
//
// The floor, for 32 keys x 32 rows x 128 dimensions: 2 x 16 tile products of 16 cycles, 512, and 64 vectors of scores,
// each some 14 instructions on two ports, 448.
#pragma once

#include "attention/cpu_fetch.h"
#include "attention/cpu_pack_amx.h"
#include "attention/cpu_rope.h"
#include "attention/cpu_scores.h"

namespace flashinfer {
namespace attention {

template <class TKv>
class AmxTile {
 public:
  using Floats = simd::Floats;
  static constexpr int32_t kRows = 192;
  static constexpr int32_t kKeys = 192;

  explicit AmxTile(const AttentionParams& p)
      : p_(p),
        rotation_(p),
        padded_dim_(round_up(p.head_dim, kDepth)),
        padded_dim_vo_(round_up(p.head_dim_vo, kDepth)) {}

  void run(const WorkItem& item) {
    start(item);
    next_.locate(p_, item, item.kv_begin, 1);
    // Fetched beside the probabilities of 32 keys and 16 rows.
    const int32_t turns = ceil_div(rows_, kBlock) * (kKeys / kDepth);
    for (begin_ = item.kv_begin; begin_ < item.kv_end; begin_ += kKeys) {
      keys_ = next_.rows;
      next_.locate(p_, item, begin_ + kKeys, turns);
      pack_keys();
      pack_values();
      for (int32_t row = 0; row < rows_; row += kPanel) {
        const int32_t begin = first(row) / kDepth * kDepth;
        const int32_t end = last(row + kPanel - 1);
        multiply_keys(row, begin, end);
        softmax(row, begin, end);
        add_values(row, begin, end);
      }
    }
    finish(item);
  }

 private:
  static constexpr int32_t kBlock = amx::kRows;                              // rows or keys of a tile register
  static constexpr int32_t kPanel = 2 * kBlock;                              // rows that are computed together
  static constexpr int32_t kDepth = amx::kRowBytes / int32_t(sizeof(bf16));  // what a product sums over
  static constexpr int32_t kBlockFloats = kBlock * kBlock;
  // A row's maximum is replaced where it grew by more than this factor of 2^8, so that O seldom has to be rescaled.
  static constexpr float kSlack = 8;
  static constexpr float kLeastScale = 1e-30f;
  static_assert(kRows % kPanel == 0 && kKeys % kDepth == 0, "panels and products fill the tile");

  const AttentionParams& p_;
  amx::Tiles tiles_;
  Rotation rotation_;
  const int32_t padded_dim_, padded_dim_vo_;
  alignas(64) bf16 q_[kRows * kMaxHeadDim];   // [row / 16, head_dim / 32, 16 pairs, 16 rows, 2]
  alignas(64) bf16 k_[kKeys * kMaxHeadDim];   // [key / 16, head_dim / 32, 16 keys, 32]
  alignas(64) bf16 v_[kMaxHeadDim * kKeys];   // [head_dim_vo / 16, key / 32, 16, 32 keys]
  alignas(64) float s_[kKeys * kPanel];       // [key, row] of a panel
  alignas(64) bf16 p_pairs_[kKeys * kPanel];  // [key / 2, row, 2] of a panel
  alignas(64) float o_[kRows * kMaxHeadDim];  // [row / 16, head_dim_vo, 16 rows]
  alignas(64) float maximum_[kRows];
  alignas(64) float sum_[kRows];
  RowLanes lanes_[kRows / kBlock];
  RowKeys<kRows> seen_;
  KeyRows<kKeys> keys_;
  NextKeys<TKv, kKeys> next_;
  const TKv* k_from_;
  const TKv* v_from_;
  uint32_t sign_;  // of the scores' factor, for two elements of q
  float scale_;
  int32_t begin_;  // first key of the tile
  int32_t rows_;

  // Rows that only fill up blocks repeat the last one; dimensions are zero.
  void start(const WorkItem& item) {
    rows_ = smaller(kRows, item.q_len * p_.group - item.row_begin);
    set_scale(score_scale(p_, item.kv_head));
    k_from_ = static_cast<const TKv*>(p_.k) + item.kv_head * p_.k_stride_head;
    v_from_ = static_cast<const TKv*>(p_.v) + item.kv_head * p_.v_stride_head;
    for (int32_t row = 0; row < round_up(rows_, kPanel); row += kBlock) {
      load_queries(item, row);
      float* o = o_ + row * padded_dim_vo_;
      for (int32_t i = 0; i < padded_dim_vo_ * kBlock; i += simd::kLanes) simd::store(o + i, Floats{});
    }
  }

  // Hidden scores are -inf before they are scaled, so the factor has to be positive: q takes its sign.
  void set_scale(float scale) {
    sign_ = std::signbit(scale) ? 0x80008000u : 0;
    scale_ = std::fabs(scale) < kLeastScale ? kLeastScale : std::fabs(scale);
  }

  void load_queries(const WorkItem& item, int32_t row) {
    alignas(64) bf16 turned[kBlock][kMaxHeadDim];
    const bf16* from[kBlock];
    for (int32_t i = 0; i < kBlock; ++i) {
      const QueryRow at(item, item.row_begin + smaller(row + i, rows_ - 1), p_.group);
      from[i] = static_cast<const bf16*>(p_.q) + at.token * p_.q_stride_token + at.head * p_.q_stride_head;
      if (rotation_.active()) {
        rotation_.seek(item.kv_len - item.q_len + at.query);
        turn(from[i], turned[i]);
        from[i] = turned[i];
      }
      lanes_[row / kBlock].set(i, p_, item, at);
      seen_.set(row + i, p_, item, at.query);
      maximum_[row + i] = -kInfinity;
      sum_[row + i] = 0;
    }
    pack_right(from, p_.head_dim, padded_dim_, sign_, q_ + row * padded_dim_);
  }

  // A row rotated, where that is asked for, and rounded; up to a whole product it is zero.
  template <class TFrom>
  void turn(const TFrom* from, bf16* to) const {
    alignas(64) float row[kMaxHeadDim];
    simd::widen_row(row, from, p_.head_dim);
    for (int32_t d = p_.head_dim; d < padded_dim_; ++d) row[d] = 0;
    if (rotation_.active()) rotation_.turn(row);
    simd::round_row(to, row, padded_dim_);
  }

  void pack_keys() {
    constexpr bool kCopies = std::is_same<TKv, bf16>::value;
    const bool copies = kCopies && !rotation_.active() && p_.head_dim == padded_dim_;
    alignas(64) bf16 turned[kMaxHeadDim];
    if (rotation_.active()) rotation_.seek(begin_);
    for (int32_t key = 0; key < keys_.count; ++key) {
      const void* row = k_from_ + keys_.k[key];
      if (!copies) {
        turn(k_from_ + keys_.k[key], turned);
        if (rotation_.active()) rotation_.advance();
        row = turned;
      }
      bf16* to = k_ + key / kBlock * kBlock * padded_dim_ + key % kBlock * kDepth;
      for (int32_t d = 0; d < padded_dim_; d += kDepth) {
        __builtin_memcpy(to + d * kBlock, static_cast<const bf16*>(row) + d, kDepth * sizeof(bf16));
      }
    }
  }

  // Keys that no row of the tile may see are zero, up to a whole product.
  void pack_values() {
    alignas(64) static constexpr bf16 kZeros[kMaxHeadDim] = {};
    alignas(64) bf16 rounded[kDepth][kMaxHeadDim];
    const int32_t begin = first(0);
    for (int32_t key = begin / kDepth * kDepth; key < keys_.count; key += kDepth) {
      const bf16* rows[kDepth];
      for (int32_t i = 0; i < kDepth; ++i) {
        const bool seen = key + i >= begin && key + i < keys_.count;
        rows[i] = seen ? value_row(v_from_ + keys_.v[key + i], rounded[i]) : kZeros;
      }
      pack_left_transposed(rows, p_.head_dim_vo, v_ + key * kBlock, kKeys * kBlock);
    }
  }

  const bf16* value_row(const bf16* from, bf16*) const { return from; }

  template <class TFrom>
  const bf16* value_row(const TFrom* from, bf16* to) const {
    alignas(64) float row[kMaxHeadDim];
    simd::widen_row(row, from, p_.head_dim_vo);
    simd::round_row(to, row, padded_dim_vo_);
    return to;
  }

  // Keys of this tile before the first and after the last one that a row may see.
  int32_t first(int32_t row) const { return clamp(seen_.begin[row] - begin_, 0, keys_.count); }
  int32_t last(int32_t row) const { return clamp(seen_.end[row] - begin_, 0, keys_.count); }

  // S^T = K Q^T, 32 keys x 32 rows at a time. Keys that fill up a block give scores that nobody reads.
  void multiply_keys(int32_t row, int32_t begin, int32_t end) {
    const int32_t dim = padded_dim_;
    for (int32_t key = begin; key < end; key += 2 * kBlock) {
      const bf16* k = k_ + key * dim;
      const bf16* q = q_ + row * dim;
      amx::zero<0>();
      amx::zero<1>();
      amx::zero<2>();
      amx::zero<3>();
      for (int32_t d = 0; d < dim; d += kDepth) {
        amx::load<4>(k + d * kBlock, amx::kRowBytes);
        amx::load<5>(k + (dim + d) * kBlock, amx::kRowBytes);
        amx::load<6>(q + d * kBlock, amx::kRowBytes);
        amx::load<7>(q + (dim + d) * kBlock, amx::kRowBytes);
        multiply_blocks();
      }
      float* s = s_ + key * kPanel;
      amx::store<0>(s, kPanel * sizeof(float));
      amx::store<1>(s + kBlock, kPanel * sizeof(float));
      amx::store<2>(s + kBlock * kPanel, kPanel * sizeof(float));
      amx::store<3>(s + kBlock * kPanel + kBlock, kPanel * sizeof(float));
    }
  }

  static void multiply_blocks() {
    amx::add_product<0, 4, 6>();
    amx::add_product<1, 4, 7>();
    amx::add_product<2, 5, 6>();
    amx::add_product<3, 5, 7>();
  }

  // Turn the scores of a panel into probabilities relative to a new maximum: P = exp2(S - m').
  void softmax(int32_t row, int32_t begin, int32_t end) {
    const bool changes = changes_scores(p_);
    const float scale = changes ? 1 : scale_;
    for (int32_t block = 0; block < kPanel; block += kBlock) {
      const RowLanes& lanes = lanes_[(row + block) / kBlock];
      const ScoreVectors scores = {s_ + begin * kPanel + block, kPanel, larger(end - begin, 0), begin_ + begin, 1};
      if (changes) {
        for (int32_t i = 0; i < scores.count; ++i) {
          simd::store(scores.s + i * kPanel, simd::load(scores.s + i * kPanel) * scale_);
        }
        lanes.change(p_, scores);
      }
      lanes.hide(scores);
      const Floats before = simd::load(maximum_ + row + block);
      const Floats m_new = highest(scores) * scale;
      const Floats m = m_new > before + kSlack ? m_new : before;
      const Floats base = m == -kInfinity ? Floats{} : m;  // a row that has seen nothing: exp2(-inf - 0) = 0
      const Floats rescale = simd::exp2(before - base);
      const Floats sum = exponentiate(scores, p_pairs_ + begin * kPanel + 2 * block, base, scale);
      simd::store(maximum_ + row + block, m);
      simd::store(sum_ + row + block, simd::fma(simd::load(sum_ + row + block), rescale, sum));
      rescale_output(row + block, rescale);
    }
  }

  // Write P, with zeros up to a whole product, and return its sum over the keys.
  Floats exponentiate(const ScoreVectors& scores, bf16* to, Floats base, float scale) {
    Floats sum[2] = {};
    const Floats factor = simd::splat(scale);
    const int32_t padded = round_up(scores.count, kDepth);
    for (int32_t i = scores.count; i < padded; ++i) simd::store(scores.s + i * kPanel, simd::splat(-kInfinity));
    for (int32_t i = 0; i < padded; i += 2) {
      if (i % kDepth == 0) next_.fetch();
      const Floats even = simd::exp2(simd::fma(simd::load(scores.s + i * kPanel), factor, -base));
      const Floats odd = simd::exp2(simd::fma(simd::load(scores.s + (i + 1) * kPanel), factor, -base));
      simd::store_bytes(to + i * kPanel, simd::pair_bf16(even, odd));
      sum[0] += even;
      sum[1] += odd;
    }
    return sum[0] + sum[1];
  }

  void rescale_output(int32_t row, Floats rescale) {
    if (simd::all_equal(rescale, 1)) return;
    float* o = o_ + row * padded_dim_vo_;
    for (int32_t i = 0; i < padded_dim_vo_ * kBlock; i += kBlock) simd::store(o + i, simd::load(o + i) * rescale);
  }

  // O^T += V^T P^T, 32 dimensions x 32 rows at a time.
  void add_values(int32_t row, int32_t begin, int32_t end) {
    const int32_t dim = padded_dim_vo_;
    for (int32_t d = 0; d < dim; d += 2 * kBlock) {
      float* o = o_ + row * dim + d * kBlock;
      float* right = o + kBlock * dim;
      amx::load<0>(o, amx::kRowBytes);
      amx::load<1>(right, amx::kRowBytes);
      amx::load<2>(o + kBlockFloats, amx::kRowBytes);
      amx::load<3>(right + kBlockFloats, amx::kRowBytes);
      for (int32_t key = begin; key < end; key += kDepth) {
        const bf16* v = v_ + d * kKeys + key * kBlock;
        const bf16* p = p_pairs_ + key * kPanel;
        amx::load<4>(v, amx::kRowBytes);
        amx::load<5>(v + kBlock * kKeys, amx::kRowBytes);
        amx::load<6>(p, 2 * kPanel * sizeof(bf16));
        amx::load<7>(p + 2 * kBlock, 2 * kPanel * sizeof(bf16));
        multiply_blocks();
      }
      amx::store<0>(o, amx::kRowBytes);
      amx::store<1>(right, amx::kRowBytes);
      amx::store<2>(o + kBlockFloats, amx::kRowBytes);
      amx::store<3>(right + kBlockFloats, amx::kRowBytes);
    }
  }

  void finish(const WorkItem& item) {
    alignas(64) float rows[kBlock][kMaxHeadDim];
    for (int32_t row = 0; row < rows_; row += kBlock) {
      unpack_transposed(o_ + row * padded_dim_vo_, padded_dim_vo_, rows);
      for (int32_t i = 0; i < smaller(kBlock, rows_ - row); ++i) {
        const QueryRow at(item, item.row_begin + row + i, p_.group);
        write_row<bf16>(p_, item, row + i, at, rows[i], maximum_[row + i], sum_[row + i]);
      }
    }
  }
};

}  // namespace attention
}  // namespace flashinfer
