// Bring query, key and value rows from global memory into a CTA's tile.
//
// Consecutive lanes copy consecutive chunks of one row, so every row is read as whole 128-byte lines wherever its page
// lies. One lane looks a row's page up; the lanes that copy the row get it by shuffle.
#pragma once

#include "attention/scores.cuh"
#include "attention/tile.cuh"
#include "core/copy.cuh"
#include "core/uniform.h"

namespace flashinfer {
namespace attention {

// Whether rows that start at `base` with these strides (in elements) can be copied 16 bytes at a time.
template <typename Element>
__device__ bool is_vectorized(const void* base, int64_t stride_a, int64_t stride_b, int64_t stride_c = 0) {
  const auto strides = static_cast<uint64_t>(stride_a | stride_b | stride_c);
  return ((reinterpret_cast<uint64_t>(base) | sizeof(Element) * strides) & 15) == 0;
}

// Bytes of a row's 16-byte chunk that exist: a tile may be wider than the rows it is filled with.
template <typename Element, typename Scores>
__device__ int chunk_bytes(int chunk, int32_t columns) {
  if constexpr (!Scores::kGeneral) return 16;
  return min(max(columns * static_cast<int>(sizeof(Element)) - 16 * chunk, 0), 16);
}

// Start to copy the query rows of an item; rows past the last are zero.
template <typename Tile, typename Scores>
__device__ void load_queries(const AttentionParams& p, const QueryRows& queries, typename Tile::Queries shared) {
  constexpr int kChunks = Tile::Queries::kChunks;
  const bool vectorized = is_vectorized<f16>(p.q, p.q_stride_token, p.q_stride_head);
  const auto* q = static_cast<const uint16_t*>(p.q);
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += Tile::kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const bool valid = queries.exists(row);
    const int bytes = valid ? chunk_bytes<f16, Scores>(chunk, p.head_dim) : 0;
    const int64_t offset =
        valid ? queries.token(row) * p.q_stride_token + queries.head(row) * p.q_stride_head + chunk * 8 : 0;
    if (vectorized) {
      copy_async(shared.chunk(row, chunk), q + offset, bytes);
    } else {
      copy_elements<f16>(shared.chunk(row, chunk), q + offset, bytes);
    }
  }
}

// The work items of one CTA.
struct Work {
  const AttentionParams& p;
  int32_t index;  // of the first item
  int32_t end;
  int32_t step;

  __device__ explicit Work(const AttentionParams& params) : p(params) {
    const bool listed = p.items != nullptr;
    index = listed ? p.worker_indptr[blockIdx.x] : blockIdx.x;
    end = listed ? p.worker_indptr[blockIdx.x + 1] : p.kv_heads * p.uniform.tiles * p.uniform.pieces;
    step = listed ? 1 : gridDim.x;
  }

  template <typename Tile>
  __device__ WorkItem at(int32_t i) const {
    return p.items != nullptr ? p.items[i] : uniform_item(p.uniform, p.group, p.kv_heads, Tile::kRows, Tile::kKeys, i);
  }
};

// Copies keys and values tile by tile through all items of a CTA, so that the copies of one item overlap the arithmetic
// of the one before. Pages are looked up one tile ahead.
template <typename Tile, typename Scores>
class KeyStream {
 public:
  __device__ explicit KeyStream(const Work& work)
      : p_(work.p),
        work_(work),
        next_index_(work.index),
        vectorized_(is_vectorized<Element>(p_.k, p_.k_stride_page, p_.k_stride_token, p_.k_stride_head) &&
                    is_vectorized<Element>(p_.v, p_.v_stride_page, p_.v_stride_token, p_.v_stride_head)) {
    fetch_item();
    enter_item();
  }

  // Start to copy the next tile, if there is one, and the queries with the first tile of an item if they are buffered.
  __device__ void load(const SharedTile<Tile>& tile, int stage) {
    if (key_ >= item_.kv_end) return;
    if (Tile::kQueryBuffers == 2 && key_ == item_.kv_begin) {
      load_queries<Tile, Scores>(p_, QueryRows{item_, p_.group}, tile.q(query_buffer_));
      query_buffer_ ^= 1;
    }
    copy_tile(tile.k(stage), tile.v(stage));
    commit_copies();
    key_ += Tile::kKeys;
    if (key_ < item_.kv_end) {
      find();
    } else {
      enter_item();
    }
  }

 private:
  using Element = typename Tile::Element;
  using Keys = typename Tile::Keys;
  using Values = typename Tile::Values;

  static constexpr int kPasses = Tile::kKeys / Tile::kRowsPerPass;
  static_assert(kPasses * Tile::kRowsPerWarpPass <= 32, "one lane looks up at most one row of a tile");

  static constexpr bool kItemAhead = Tile::kQueryBuffers == 2;  // where items are short

  __device__ void fetch_item() {
    if (kItemAhead && next_index_ < work_.end) next_ = work_.at<Tile>(next_index_);
  }

  // Go to the first tile of the next item that has one.
  __device__ void enter_item() {
    do {
      if (next_index_ >= work_.end) return;  // the last item stays, exhausted
      item_ = kItemAhead ? next_ : work_.at<Tile>(next_index_);
      next_index_ += work_.step;
      fetch_item();
    } while (item_.kv_begin >= item_.kv_end);
    key_ = item_.kv_begin;
    find();
  }

  // Each lane finds one row that its warp will copy.
  __device__ void find() {
    const int lane = threadIdx.x % 32;
    const int pass = lane / Tile::kRowsPerWarpPass;
    const int32_t key = key_ + row_of(pass, lane % Tile::kRowsPerWarpPass);
    k_row_ = v_row_ = 0;
    if (Scores::kGeneral) k_row_ = kHidden;
    if (pass >= kPasses || key >= item_.kv_end) return;
    if (Scores::kGeneral && !is_seen(p_, QueryRows{item_, p_.group}, key, Tile::kRows)) return;
    int64_t page = 0;
    int64_t slot = item_.kv_start + key;
    if (p_.page_table != nullptr) {
      page = p_.page_table[item_.kv_start + key / p_.page_size];
      slot = key % p_.page_size;
    }
    k_row_ = page * p_.k_stride_page + slot * p_.k_stride_token + item_.kv_head * p_.k_stride_head;
    v_row_ = page * p_.v_stride_page + slot * p_.v_stride_token + item_.kv_head * p_.v_stride_head;
  }

  __device__ static int row_of(int pass, int row_in_pass) {
    return pass * Tile::kRowsPerPass + threadIdx.x / 32 * Tile::kRowsPerWarpPass + row_in_pass;
  }

  __device__ void copy_tile(Keys k, Values v) const {
    if (vectorized_) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) copy_pass<copy_async>(pass, k, v);
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) copy_pass<copy_elements<Element>>(pass, k, v);
    }
  }

  // Keys past the end of the piece are zero, and keys that no row of the tile sees: what lies there may be no number,
  // which even a probability of zero would spread.
  template <void (*kCopy)(void*, const void*, int)>
  __device__ void copy_pass(int pass, Keys k, Values v) const {
    const int lane = threadIdx.x % 32;
    const int row_in_pass = lane / Tile::kLanesPerRow;
    const int row = row_of(pass, row_in_pass);
    const int source = pass * Tile::kRowsPerWarpPass + row_in_pass;
    const int64_t k_row = __shfl_sync(0xffffffff, k_row_, source);
    const int64_t v_row = __shfl_sync(0xffffffff, v_row_, source);
    const bool valid = Scores::kGeneral ? k_row != kHidden : key_ + row < item_.kv_end;
    copy_row<kCopy>(k, row, static_cast<const Element*>(p_.k) + (Scores::kGeneral && !valid ? 0 : k_row), valid,
                    p_.head_dim);
    copy_row<kCopy>(v, row, static_cast<const Element*>(p_.v) + v_row, valid, p_.head_dim_vo);
  }

  template <void (*kCopy)(void*, const void*, int), typename Rows>
  __device__ static void copy_row(Rows shared, int row, const Element* source, bool valid, int32_t columns) {
#pragma unroll
    for (int i = 0; i < Rows::kChunks / Tile::kLanesPerRow; ++i) {
      const int chunk = i * Tile::kLanesPerRow + threadIdx.x % Tile::kLanesPerRow;
      kCopy(shared.chunk(row, chunk), source + chunk * Rows::kChunkElements,
            valid ? chunk_bytes<Element, Scores>(chunk, columns) : 0);
    }
  }

  static constexpr int64_t kHidden = -1ll << 63;

  const AttentionParams& p_;
  const Work& work_;
  WorkItem item_ = {};  // of the tile that is copied next
  WorkItem next_;       // the item after it
  int32_t next_index_;
  int32_t key_ = 0;
  int64_t k_row_ = 0;  // offset in elements of the row that this lane has found
  int64_t v_row_ = 0;
  int query_buffer_ = 0;
  bool vectorized_;
};

}  // namespace attention
}  // namespace flashinfer
