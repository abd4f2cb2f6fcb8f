// The shape of one CTA's tile and where its parts lie in shared memory.
//
// Rows of shared memory are swizzled: 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that eight rows of one
// chunk fall into different banks.
#pragma once

#include "attention/params.h"
#include "core/mma.cuh"

namespace flashinfer {
namespace attention {

template <int kHeadDim_, int kRows_, int kKeys_, int kWarps_>
struct Tile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;  // packed query rows
  static constexpr int kKeys = kKeys_;  // keys of one step
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = 2;                                        // K and V tiles: one in use, one in flight
  static constexpr int kQueryBuffers = kRows == 16 && kWarps > 1 ? 2 : 1;  // small ones are fetched ahead like K and V

  // A tile of 16 rows gives each warp a slice of the keys; larger ones give each warp a slice of the rows.
  static constexpr int kWarpsOverRows = kRows == 16 ? 1 : kWarps;
  static constexpr int kWarpsOverKeys = kWarps / kWarpsOverRows;
  static constexpr int kWarpKeys = kKeys / kWarpsOverKeys;
  static constexpr int kRowBlocks = kRows / kWarpsOverRows / 16;  // 16-row fragments of a warp
  static constexpr int kKeyBlocks = kWarpKeys / 8;                // 8-key accumulators of a warp
  static constexpr int kDimBlocks = kHeadDim / 8;                 // 8-column accumulators of the output

  static constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kRowsPerWarpPass = 32 / kChunks;
  static constexpr int kRowsPerPass = kWarps * kRowsPerWarpPass;

  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "rows are copied by 8, 16 or 32 lanes");
  static_assert(kWarpKeys % 16 == 0 && kRowBlocks * 16 * kWarpsOverRows == kRows, "fragments tile the warp's slice");
  static_assert(kKeys % kRowsPerPass == 0 && kRows % kRowsPerPass == 0, "copies tile the rows");
};

// A 16-bit matrix of kHeadDim columns in shared memory.
template <typename Tile>
struct SharedRows {
  uint16_t* data;

  __device__ void* chunk(int row, int chunk) const { return data + row * Tile::kHeadDim + ((chunk ^ (row & 7)) * 8); }

  // Rows [row, row + 16) and columns [16 * step, +16) as operand A.
  __device__ void load(FragmentA& a, int row, int step, int lane) const {
    load_matrix(a.x, chunk(row + lane % 16, 2 * step + lane / 16));
  }

  // The transpose of rows [row, row + 16) and columns [16 * step, +16) as two operands B of 8 columns: Q K^T.
  __device__ void load_transposed(FragmentB (&b)[2], int row, int step, int lane) const {
    uint32_t x[4];
    load_matrix(x, chunk(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }

  // Rows [row, row + 16) and columns [16 * block, +16) as two operands B of 8 columns: P V.
  __device__ void load(FragmentB (&b)[2], int row, int block, int lane) const {
    uint32_t x[4];
    load_matrix_transposed(x, chunk(row + lane % 16, 2 * block + lane / 16));
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }
};

// The parts of a CTA's shared memory: queries, then K and V of each stage, then the states that warps exchange.
template <typename Tile>
struct SharedTile {
  uint16_t* base;

  __device__ SharedRows<Tile> q(int buffer) const { return {rows(buffer * Tile::kRows)}; }
  __device__ SharedRows<Tile> k(int stage) const { return {rows(kQueryRows + 2 * stage * Tile::kKeys)}; }
  __device__ SharedRows<Tile> v(int stage) const { return {rows(kQueryRows + (2 * stage + 1) * Tile::kKeys)}; }

  // Where warps that saw different keys exchange their sums of values: a stage that is not in use.
  __device__ float* values(int stage) const { return reinterpret_cast<float*>(k(stage).data); }
  __device__ float* states() const {
    return reinterpret_cast<float*>(rows(kQueryRows + 2 * Tile::kStages * Tile::kKeys));
  }

 private:
  static constexpr int kQueryRows = Tile::kQueryBuffers * Tile::kRows;
  static_assert(Tile::kWarpsOverKeys == 1 || Tile::kWarps * 16 * 4 <= 2 * Tile::kKeys * 2, "the values fit a stage");

  __device__ uint16_t* rows(int row) const { return base + row * Tile::kHeadDim; }
};

// The query rows of one work item: packed row r is query r / group, head r % group of the KV head.
struct QueryRows {
  const WorkItem& item;
  const int32_t& group;

  // Rows past the last of the request are computed with the others of the tile, and left out.
  __device__ bool exists(int row) const { return item.row_begin + row < item.q_len * group; }
  __device__ int32_t query(int row) const { return (item.row_begin + row) / group; }
  __device__ int64_t token(int row) const { return static_cast<int64_t>(item.q_start) + query(row); }
  __device__ int32_t head(int row) const { return item.kv_head * group + (item.row_begin + row) % group; }

  // One past the last key that the row sees in this piece.
  __device__ int32_t key_limit(int row, int32_t causal) const {
    return causal ? min(item.kv_end, query(row) + item.kv_len - item.q_len + 1) : item.kv_end;
  }
};

}  // namespace attention
}  // namespace flashinfer
