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

// Whether rows of 16-bit elements that start at `base` with these strides can be copied 16 bytes at a time.
__device__ inline bool is_vectorized(const void* base, int64_t stride_a, int64_t stride_b) {
  return ((reinterpret_cast<uint64_t>(base) | 2 * static_cast<uint64_t>(stride_a | stride_b)) & 15) == 0;
}

// Bytes of a row's 16-byte chunk that exist: a tile may be wider than the rows it is filled with.
template <typename Element, typename Scores>
__device__ int chunk_bytes(int chunk, int32_t columns) {
  if constexpr (!Scores::kGeneral) return 16;
  return min(max(columns * static_cast<int>(sizeof(Element)) - 16 * chunk, 0), 16);
}

// Start to copy the query rows of an item; rows past the last are zero. Where warps have rows of their own, each copies
// its own.
template <typename Tile, typename Scores>
__device__ void load_queries(const AttentionParams& p, const QueryRows& queries, typename Tile::Queries shared) {
  constexpr bool kOwn = Tile::kWarpsOverRows > 1;
  constexpr int kLanes = Tile::kLanesPerRow;
  constexpr int kStep = 32 / kLanes * (kOwn ? 1 : Tile::kWarps);
  const int first = threadIdx.x / 32 * (kOwn ? Tile::kRowBlocks * 16 : 32 / kLanes) + threadIdx.x % 32 / kLanes;
  const bool vectorized = is_vectorized(p.q, p.q_stride_token, p.q_stride_head);
  const auto* q = static_cast<const uint16_t*>(p.q);
#pragma unroll 1
  for (int row = first; row < first + Tile::kRows / Tile::kWarpsOverRows; row += kStep) {
    const bool valid = queries.exists(row);
    const int64_t offset = valid ? queries.token(row) * p.q_stride_token + queries.head(row) * p.q_stride_head : 0;
#pragma unroll
    for (int i = 0; i < Tile::Queries::kChunks; i += kLanes) {
      const int chunk = threadIdx.x % kLanes + i;
      const int bytes = valid ? chunk_bytes<f16, Scores>(chunk, p.head_dim) : 0;
      if (vectorized) {
        copy_async(shared.chunk(row, chunk), q + offset + chunk * 8, bytes);
      } else {
        copy_elements<f16>(shared.chunk(row, chunk), q + offset + chunk * 8, bytes);
      }
    }
  }
}

// The work items of one CTA. What is read seldom is not kept: registers are scarce.
struct Work {
  const AttentionParams& p;

  __device__ bool is_listed() const { return p.items != nullptr; }
  __device__ int32_t begin() const { return is_listed() ? p.worker_indptr[blockIdx.x] : blockIdx.x; }
  __device__ int32_t end() const {
    return is_listed() ? p.worker_indptr[blockIdx.x + 1] : p.kv_heads * p.uniform.tiles * p.uniform.pieces;
  }
  __device__ int32_t after(int32_t i) const { return i + (is_listed() ? 1 : gridDim.x); }
  __device__ int32_t before(int32_t i) const { return i - (is_listed() ? 1 : gridDim.x); }

  template <typename Tile>
  __device__ WorkItem at(int32_t i) const {
    if (is_listed()) return p.items[i];
    const UniformWork& u = p.uniform;
    const UniformWork work = {computed_here(u.q_len),      computed_here(u.kv_len),    computed_here(u.tiles),
                              computed_here(u.pieces),     computed_here(u.piece_len), computed_here(u.causal),
                              computed_here(u.window_left)};
    return uniform_item(work, computed_here(p.group), computed_here(p.kv_heads), Tile::kRows, Tile::kKeys, i);
  }

  // Start to copy the queries of the first item from `i` on that has keys.
  template <typename Tile, typename Scores>
  __device__ void load_queries(int32_t i, typename Tile::Queries shared) const {
    for (const int32_t last = end(); i < last; i = after(i)) {
      const WorkItem item = at<Tile>(i);
      if (item.kv_begin >= item.kv_end) continue;
      attention::load_queries<Tile, Scores>(p, QueryRows(item, p.group), shared);
      commit_copies();
      return;
    }
  }
};

// Copies keys and values tile by tile through all items of a CTA, so that the copies of one item overlap the arithmetic
// of the one before. Pages are looked up one tile ahead.
template <typename Tile, typename Scores>
class KeyStream {
 public:
  __device__ explicit KeyStream(const Work& work) : p_(work.p), work_(work), next_index_(work.begin()) {
    fetch_item();
    enter_item();
  }

  // Start to copy the next tile, if there is one, and the queries with the first tile of an item if they are buffered.
  __device__ void load(const SharedTile<Tile>& tile, int stage) {
    if (key_ >= item_.kv_end) return;
    if (Tile::kQueryBuffers == 2 && key_ == item_.kv_begin) {
      load_queries<Tile, Scores>(p_, QueryRows(item_, p_.group), tile.q(query_buffer_));
      query_buffer_ ^= 1;
    }
    copy_tile(tile.k(stage), tile.v(stage));
    commit_copies();
    key_ += Tile::kKeys;
    if (key_ >= item_.kv_end) {
      enter_item();
    } else if (Scores::kGeneral || p_.page_table != nullptr) {
      find();
    } else {
      k_row_ += Tile::kKeys * p_.k_stride_token;
      v_row_ += Tile::kKeys * p_.v_stride_token;
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
    if (kItemAhead && next_index_ < work_.end()) next_ = work_.at<Tile>(next_index_);
  }

  // Go to the first tile of the next item that has one.
  __device__ void enter_item() {
    do {
      if (next_index_ >= work_.end()) return;  // the last item stays, exhausted
      item_ = kItemAhead ? next_ : work_.at<Tile>(next_index_);
      next_index_ = work_.after(next_index_);
      fetch_item();
    } while (item_.kv_begin >= item_.kv_end);
    key_ = item_.kv_begin;
    find();
  }

  // Each lane finds one row that its warp will copy.
  __device__ void find() {
    const int thread = computed_here(threadIdx.x);
    const int pass = thread % 32 / Tile::kRowsPerWarpPass;
    const int32_t key = key_ + row_of(thread, pass, thread % Tile::kRowsPerWarpPass);
    if (Scores::kGeneral) k_row_ = kHidden;
    if (pass >= kPasses || key >= item_.kv_end) return;
    const WorkItem item = kItemAhead ? item_ : work_.at<Tile>(work_.before(next_index_));
    if (Scores::kGeneral && !is_seen(p_, QueryRows(item, p_.group), key, Tile::kRows)) return;
    int64_t page = 0;
    int64_t slot = item.kv_start + key;
    if (p_.page_table != nullptr) {
      const int32_t size = computed_here(p_.page_size);
      const int32_t entry = size & (size - 1) ? key / size : key >> (31 - __clz(size));
      page = p_.page_table[item.kv_start + entry];
      slot = key - entry * size;
    }
    k_row_ = page * p_.k_stride_page + slot * p_.k_stride_token + item.kv_head * p_.k_stride_head;
    v_row_ = page * p_.v_stride_page + slot * p_.v_stride_token + item.kv_head * p_.v_stride_head;
  }

  __device__ static int row_of(int thread, int pass, int row_in_pass) {
    return pass * Tile::kRowsPerPass + thread / 32 * Tile::kRowsPerWarpPass + row_in_pass;
  }

  __device__ void copy_tile(Keys k, Values v) const {
    const int thread = computed_here(threadIdx.x);
    const bool misaligned = (lowest_bits(p_.k, k_row_) | lowest_bits(p_.v, v_row_)) & 15;
    if (!__any_sync(0xffffffff, misaligned)) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) copy_pass<copy_async>(thread, pass, k, v);
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) copy_pass<copy_elements<Element>>(thread, pass, k, v);
    }
  }

  __device__ static uint32_t lowest_bits(const void* base, int64_t row) {
    return static_cast<uint32_t>(reinterpret_cast<uint64_t>(base)) + static_cast<uint32_t>(row * sizeof(Element));
  }

  // Keys past the end of the piece are zero, and keys that no row of the tile sees: what lies there may be no number,
  // which even a probability of zero would spread.
  template <void (*kCopy)(void*, const void*, int)>
  __device__ void copy_pass(int thread, int pass, Keys k, Values v) const {
    const int row_in_pass = thread % 32 / Tile::kLanesPerRow;
    const int row = row_of(thread, pass, row_in_pass);
    const int source = pass * Tile::kRowsPerWarpPass + row_in_pass;
    const int chunk = thread % Tile::kLanesPerRow;
    const int64_t k_row = __shfl_sync(0xffffffff, k_row_, source);
    const int64_t v_row = __shfl_sync(0xffffffff, v_row_, source);
    const bool valid = Scores::kGeneral ? k_row != kHidden : row < item_.kv_end - key_;
    copy_row<kCopy>(k, row, chunk, static_cast<const Element*>(p_.k) + (Scores::kGeneral && !valid ? 0 : k_row), valid,
                    p_.head_dim);
    copy_row<kCopy>(v, row, chunk, static_cast<const Element*>(p_.v) + v_row, valid, p_.head_dim_vo);
  }

  template <void (*kCopy)(void*, const void*, int), typename Rows>
  __device__ static void copy_row(Rows shared, int row, int first, const Element* source, bool valid, int32_t columns) {
    const auto* chunks = reinterpret_cast<const uint8_t*>(source) + first * 16;
#pragma unroll
    for (int i = 0; i < Rows::kChunks; i += Tile::kLanesPerRow) {
      kCopy(shared.chunk(row, first + i), chunks + i * 16,
            valid ? chunk_bytes<Element, Scores>(first + i, columns) : 0);
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
};

}  // namespace attention
}  // namespace flashinfer
