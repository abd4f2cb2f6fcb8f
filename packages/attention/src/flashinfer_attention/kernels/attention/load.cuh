// Bring query, key and value rows from global memory into a CTA's tile.
//
// Consecutive lanes copy consecutive chunks of one row, so every row is read as whole 128-byte lines wherever its page
// lies. One lane looks a row's page up; the lanes that copy the row get it by shuffle.
#pragma once

#include "attention/tile.cuh"
#include "core/copy.cuh"

namespace flashinfer {
namespace attention {

// Whether rows that start at `base` with these strides (in 16-bit elements) can be copied 16 bytes at a time.
__device__ inline bool is_vectorized(const void* base, int64_t stride_a, int64_t stride_b, int64_t stride_c = 0) {
  return ((reinterpret_cast<uint64_t>(base) | 2 * static_cast<uint64_t>(stride_a | stride_b | stride_c)) & 15) == 0;
}

// Start to copy the query rows of an item; rows past the last are zero.
template <typename Tile>
__device__ void load_queries(const AttentionParams& p, const QueryRows& queries, SharedRows<Tile> shared) {
  const int chunk = threadIdx.x % Tile::kChunks;
  const bool vectorized = is_vectorized(p.q, p.q_stride_token, p.q_stride_head);
  const auto* q = static_cast<const uint16_t*>(p.q);
  for (int row = threadIdx.x / Tile::kChunks; row < Tile::kRows; row += Tile::kRowsPerPass) {
    const bool valid = row < queries.rows;
    const int64_t offset =
        valid ? queries.token(row) * p.q_stride_token + queries.head(row) * p.q_stride_head + chunk * 8 : 0;
    if (vectorized) {
      copy_async(shared.chunk(row, chunk), q + offset, valid);
    } else {
      copy_elements(shared.chunk(row, chunk), q + offset, valid);
    }
  }
}

// Copies the keys and values of one item, a tile at a time. `find` must precede the `load` of the same tile, best by a
// whole tile, so that the page numbers have arrived.
template <typename Tile>
class KeyLoader {
 public:
  __device__ KeyLoader(const AttentionParams& p, const WorkItem& item)
      : p_(p),
        item_(item),
        k_(static_cast<const uint16_t*>(p.k) + item.kv_head * p.k_stride_head),
        v_(static_cast<const uint16_t*>(p.v) + item.kv_head * p.v_stride_head),
        vectorized_(is_vectorized(k_, p.k_stride_page, p.k_stride_token, p.k_stride_head) &&
                    is_vectorized(v_, p.v_stride_page, p.v_stride_token, p.v_stride_head)) {}

  // Each lane looks up the page of one row that its warp will copy.
  __device__ void find(int32_t first_key) {
    const int lane = threadIdx.x % 32;
    const int pass = lane / Tile::kRowsPerWarpPass;
    const int32_t key = first_key + row_of(pass, lane % Tile::kRowsPerWarpPass);
    const bool valid = pass < kPasses && key < item_.kv_end;
    if (p_.page_table == nullptr) {
      page_ = 0;
      slot_ = item_.kv_start + key;
    } else if (valid) {
      page_ = p_.page_table[item_.kv_start + key / p_.page_size];
      slot_ = key % p_.page_size;
    }
  }

  // Start to copy the tile that was found last; keys past the end of the piece are zero.
  __device__ void load(int32_t first_key, SharedRows<Tile> k, SharedRows<Tile> v) const {
    if (vectorized_) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) load_pass<copy_async>(pass, first_key, k, v);
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) load_pass<copy_elements>(pass, first_key, k, v);
    }
  }

 private:
  static constexpr int kPasses = Tile::kKeys / Tile::kRowsPerPass;
  static_assert(kPasses * Tile::kRowsPerWarpPass <= 32, "one lane looks up at most one row of a tile");

  __device__ static int row_of(int pass, int row_in_pass) {
    return pass * Tile::kRowsPerPass + threadIdx.x / 32 * Tile::kRowsPerWarpPass + row_in_pass;
  }

  template <void (*kCopy)(void*, const void*, bool)>
  __device__ void load_pass(int pass, int32_t first_key, SharedRows<Tile> k, SharedRows<Tile> v) const {
    const int lane = threadIdx.x % 32;
    const int chunk = lane % Tile::kChunks;
    const int row_in_pass = lane / Tile::kChunks;
    const int row = row_of(pass, row_in_pass);
    const int source = pass * Tile::kRowsPerWarpPass + row_in_pass;
    const int64_t page = __shfl_sync(0xffffffff, page_, source);
    const int64_t slot = __shfl_sync(0xffffffff, slot_, source);
    const bool valid = first_key + row < item_.kv_end;
    const int64_t k_offset = valid ? page * p_.k_stride_page + slot * p_.k_stride_token + chunk * 8 : 0;
    const int64_t v_offset = valid ? page * p_.v_stride_page + slot * p_.v_stride_token + chunk * 8 : 0;
    kCopy(k.chunk(row, chunk), k_ + k_offset, valid);
    kCopy(v.chunk(row, chunk), v_ + v_offset, valid);
  }

  const AttentionParams& p_;
  const WorkItem& item_;
  const uint16_t* k_;
  const uint16_t* v_;
  bool vectorized_;
  int32_t page_ = 0;
  int32_t slot_ = 0;
};

}  // namespace attention
}  // namespace flashinfer
