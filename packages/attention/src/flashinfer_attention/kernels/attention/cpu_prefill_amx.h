// Attention of a tile of packed rows of one KV head in bf16, as two products of AMX tiles.
//
// Both results are kept transposed: S^T = K Q^T takes keys as they lie in memory, and P, rounded to bf16, is then the
// right-hand side of O^T = V^T P^T once two keys' probabilities are put side by side. What has to be transposed is V.
#pragma once

#include "attention/cpu_rows.h"
#include "core/amx.h"
#include "core/avx512.h"

namespace flashinfer {
namespace attention {

class AmxTile {
 public:
  using Floats = simd::Floats;
  static constexpr int32_t kRows = 192;
  static constexpr int32_t kKeys = 192;

  void run(const AttentionParams& p, const WorkItem& item) {
    start(p, item);
    locate(p, item, item.kv_begin);
    for (begin_ = item.kv_begin; begin_ < item.kv_end; begin_ += kKeys) {
      keys_ = next_;
      locate(p, item, begin_ + kKeys);
      pack_keys();
      pack_values();
      for (int32_t row = 0; row < rows_; row += kPanel) {
        const int32_t keys = visible(row + kPanel - 1);
        multiply_keys(row, keys);
        softmax(row, keys);
        add_values(row, keys);
      }
    }
    finish(p, item);
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

  alignas(64) bf16 q_[kRows * kMaxHeadDim];   // [row / 16, head_dim / 32, 16 pairs, 16 rows, 2]
  alignas(64) bf16 k_[kKeys * kMaxHeadDim];   // [key / 16, head_dim / 32, 16 keys, 32]
  alignas(64) bf16 v_[kMaxHeadDim * kKeys];   // [head_dim / 16, key / 32, 16, 32 keys]
  alignas(64) float s_[kKeys * kPanel];       // [key, row] of a panel
  alignas(64) bf16 p_[kKeys * kPanel];        // [key / 2, row, 2] of a panel
  alignas(64) float o_[kRows * kMaxHeadDim];  // [row / 16, head_dim, 16 rows]
  alignas(64) float maximum_[kRows];
  alignas(64) float sum_[kRows];
  alignas(64) int32_t seen_[kRows];  // keys that a row sees; increases with the row
  amx::Tiles tiles_;
  KeyRows<kKeys> keys_, next_;  // of this tile, and of the one that is being fetched
  const bf16* k_from_;
  const bf16* v_from_;
  uint32_t sign_;  // of the scores' factor, for two elements of q
  float scale_;
  int32_t fetched_;     // keys of next_
  int32_t fetch_step_;  // keys that are fetched beside the probabilities of 32 keys and 16 rows
  int32_t begin_;       // first key of the tile
  int32_t rows_;
  int32_t head_dim_;
  int32_t padded_dim_;

  // Rows and dimensions that only fill up blocks: rows repeat the last one, dimensions are zero.
  void start(const AttentionParams& p, const WorkItem& item) {
    rows_ = smaller(kRows, item.q_len * p.group - item.row_begin);
    head_dim_ = p.head_dim;
    padded_dim_ = round_up(head_dim_, kDepth);
    // Hidden scores are -inf before they are scaled, so the factor has to be positive: q takes its sign.
    const float scale = std::fabs(p.sm_scale * kLog2E);
    scale_ = scale < kLeastScale ? kLeastScale : scale;
    sign_ = std::signbit(p.sm_scale) ? 0x80008000u : 0;
    fetch_step_ = ceil_div(kBlock * kDepth, rows_);
    k_from_ = static_cast<const bf16*>(p.k) + item.kv_head * p.k_stride_head;
    v_from_ = static_cast<const bf16*>(p.v) + item.kv_head * p.v_stride_head;
    const bf16* from[kRows];
    for (int32_t i = 0; i < round_up(rows_, kPanel); ++i) {
      const QueryRow at(item, smaller(item.row_begin + i, item.row_begin + rows_ - 1), p.group);
      from[i] = static_cast<const bf16*>(p.q) + at.token * p.q_stride_token + at.head * p.q_stride_head;
      seen_[i] = keys_seen(p, item, at.query);
      maximum_[i] = -kInfinity;
      sum_[i] = 0;
    }
    for (int32_t row = 0; row < round_up(rows_, kPanel); row += kBlock) {
      pack_queries(from + row, q_ + row * padded_dim_);
      for (int32_t i = 0; i < padded_dim_ * kBlock; i += simd::kLanes)
        simd::store(o_ + row * padded_dim_ + i, Floats{});
    }
  }

  // 16 rows as a right-hand side: pairs of elements of all rows side by side.
  void pack_queries(const bf16* const* rows, bf16* to) const {
    for (int32_t d = 0; d < head_dim_; d += 8) {
      simd::Bytes x[4];
      for (int32_t i = 0; i < 4; ++i)
        x[i] = simd::join(rows[i] + d, rows[4 + i] + d, rows[8 + i] + d, rows[12 + i] + d);
      simd::transpose_parts<uint32_t>(x);
      for (int32_t i = 0; i < 4; ++i)
        simd::store_bytes(to + d * kBlock + i * kDepth, (simd::Bytes)((simd::Words)x[i] ^ sign_));
    }
    for (int32_t d = head_dim_; d < padded_dim_; d += 2) simd::store_bytes(to + d * kBlock, simd::Bytes{});
  }

  void locate(const AttentionParams& p, const WorkItem& item, int32_t begin) {
    next_.locate(p, item.kv_start, begin, begin < item.kv_end ? smaller(begin + kKeys, item.kv_end) : begin);
    fetched_ = 0;
  }

  // Rows of one head lie too far apart for the hardware to foresee, and crowd into few sets of the caches.
  void fetch() {
    const int32_t end = smaller(fetched_ + fetch_step_, next_.count);
    for (; fetched_ < end; ++fetched_) {
      for (int32_t d = 0; d < head_dim_; d += kDepth) {
        __builtin_prefetch(k_from_ + next_.k[fetched_] + d, 0, 2);
        __builtin_prefetch(v_from_ + next_.v[fetched_] + d, 0, 2);
      }
    }
  }

  void pack_keys() {
    for (int32_t key = 0; key < keys_.count; ++key) {
      const bf16* row = k_from_ + keys_.k[key];
      bf16* to = k_ + key / kBlock * kBlock * padded_dim_ + key % kBlock * kDepth;
      int32_t d = 0;
      for (; d + kDepth <= head_dim_; d += kDepth) __builtin_memcpy(to + d * kBlock, row + d, kDepth * sizeof(bf16));
      if (d == padded_dim_) continue;
      to += d * kBlock;
      for (int32_t i = 0; i < kDepth; i += 8) {
        if (d + i < head_dim_)
          __builtin_memcpy(to + i, row + d + i, 8 * sizeof(bf16));
        else
          __builtin_memset(to + i, 0, 8 * sizeof(bf16));
      }
    }
  }

  // Keys beyond the last one are zero up to a whole product.
  void pack_values() {
    alignas(64) static constexpr bf16 kZeros[kMaxHeadDim] = {};
    for (int32_t key = 0; key < keys_.count; key += kDepth) {
      const bf16* rows[kDepth];
      for (int32_t i = 0; i < kDepth; ++i) rows[i] = key + i < keys_.count ? v_from_ + keys_.v[key + i] : kZeros;
      for (int32_t d = 0; d < head_dim_; d += 8) {
        simd::Bytes x[8];
        for (int32_t i = 0; i < 8; ++i)
          x[i] = simd::join(rows[i] + d, rows[8 + i] + d, rows[16 + i] + d, rows[24 + i] + d);
        simd::transpose_parts<uint16_t>(x);
        for (int32_t i = 0; i < 8; ++i)
          simd::store_bytes(v_ + (d / kBlock * kKeys + key) * kBlock + (d % kBlock + i) * kDepth, x[i]);
      }
    }
  }

  // Keys of this tile that a row sees.
  int32_t visible(int32_t row) const { return clamp(seen_[row] - begin_, 0, keys_.count); }

  // S^T = K Q^T, 32 keys x 32 rows at a time. Keys that fill up a block give scores that nobody reads.
  void multiply_keys(int32_t row, int32_t keys) {
    const int32_t dim = padded_dim_;
    for (int32_t key = 0; key < keys; key += 2 * kBlock) {
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
  void softmax(int32_t row, int32_t keys) {
    for (int32_t block = 0; block < kPanel; block += kBlock) {
      const Floats before = simd::load(maximum_ + row + block);
      const Floats highest = mask_scores(row + block, s_ + block, keys) * scale_;
      const Floats m = highest > before + kSlack ? highest : before;
      const Floats base = m == -kInfinity ? Floats{} : m;  // a row that has seen nothing: exp2(-inf - 0) = 0
      const Floats rescale = simd::exp2(before - base);
      const Floats sum = exponentiate(s_ + block, p_ + 2 * block, base, keys);
      simd::store(maximum_ + row + block, m);
      simd::store(sum_ + row + block, simd::fma(simd::load(sum_ + row + block), rescale, sum));
      rescale_output(row + block, rescale);
    }
  }

  // Mask the scores of 16 rows and return their maximum, both not yet scaled.
  Floats mask_scores(int32_t row, float* s, int32_t keys) {
    Floats m[4];
    for (Floats& x : m) x = simd::splat(-kInfinity);
    int32_t key = 0;
    for (const int32_t all = visible(row) / 4 * 4; key < all; key += 4) {
      for (int32_t i = 0; i < 4; ++i) m[i] = simd::maximum(m[i], simd::load(s + (key + i) * kPanel));
    }
    simd::Ints seen;
    __builtin_memcpy(&seen, seen_ + row, sizeof(seen));
    for (; key < keys; ++key) {
      const Floats x = begin_ + key < seen ? simd::load(s + key * kPanel) : simd::splat(-kInfinity);
      simd::store(s + key * kPanel, x);
      m[0] = simd::maximum(m[0], x);
    }
    return simd::maximum(simd::maximum(m[0], m[1]), simd::maximum(m[2], m[3]));
  }

  // Write P, with zeros up to a whole product, and return its sum over the keys.
  Floats exponentiate(float* s, bf16* p, Floats base, int32_t keys) {
    Floats sum[2] = {};
    const Floats scale = simd::splat(scale_);
    const int32_t padded = round_up(keys, kDepth);
    for (int32_t key = keys; key < padded; ++key) simd::store(s + key * kPanel, simd::splat(-kInfinity));
    for (int32_t key = 0; key < padded; key += 2) {
      if (key % kDepth == 0) fetch();
      const Floats even = simd::exp2(simd::fma(simd::load(s + key * kPanel), scale, -base));
      const Floats odd = simd::exp2(simd::fma(simd::load(s + (key + 1) * kPanel), scale, -base));
      simd::store_bytes(p + key * kPanel, simd::pair_bf16(even, odd));
      sum[0] += even;
      sum[1] += odd;
    }
    return sum[0] + sum[1];
  }

  void rescale_output(int32_t row, Floats rescale) {
    if (simd::all_equal(rescale, 1)) return;
    float* o = o_ + row * padded_dim_;
    for (int32_t i = 0; i < padded_dim_ * kBlock; i += kBlock) simd::store(o + i, simd::load(o + i) * rescale);
  }

  // O^T += V^T P^T, 32 dimensions x 32 rows at a time.
  void add_values(int32_t row, int32_t keys) {
    const int32_t dim = padded_dim_;
    for (int32_t d = 0; d < dim; d += 2 * kBlock) {
      float* o = o_ + row * dim + d * kBlock;
      float* right = o + kBlock * dim;
      amx::load<0>(o, amx::kRowBytes);
      amx::load<1>(right, amx::kRowBytes);
      amx::load<2>(o + kBlockFloats, amx::kRowBytes);
      amx::load<3>(right + kBlockFloats, amx::kRowBytes);
      for (int32_t key = 0; key < keys; key += kDepth) {
        const bf16* v = v_ + d * kKeys + key * kBlock;
        const bf16* p = p_ + key * kPanel;
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

  void finish(const AttentionParams& p, const WorkItem& item) {
    alignas(64) float rows[kBlock][kMaxHeadDim];
    for (int32_t row = 0; row < rows_; row += kBlock) {
      unpack_output(o_ + row * padded_dim_, rows);
      for (int32_t i = 0; i < smaller(kBlock, rows_ - row); ++i) {
        const QueryRow at(item, item.row_begin + row + i, p.group);
        write_row<bf16>(p, item, row + i, at, rows[i], maximum_[row + i], sum_[row + i]);
      }
    }
  }

  // 16 rows of O from O^T, [head_dim, 16 rows].
  void unpack_output(const float* o, float (*rows)[kMaxHeadDim]) const {
    for (int32_t d = 0; d < padded_dim_; d += kBlock, o += kBlockFloats) {
      for (int32_t row = 0; row < kBlock; row += 4) {
        simd::Bytes x[4];
        for (int32_t i = 0; i < 4; ++i) {
          const float* from = o + i * kBlock + row;
          x[i] = simd::join(from, from + 4 * kBlock, from + 8 * kBlock, from + 12 * kBlock);
        }
        simd::transpose_parts<uint32_t>(x);
        for (int32_t i = 0; i < 4; ++i) simd::store_bytes(rows[row + i] + d, x[i]);
      }
    }
  }
};

}  // namespace attention
}  // namespace flashinfer
