// The shape of one CTA's tile and where its parts lie in shared memory.
//
// Eight rows of one 16-byte chunk fall into different banks: chunk c of row r lies at chunk c ^ (r % 8) where a row has
// a multiple of eight chunks, and rows are an odd number of chunks apart where it has not.
#pragma once

#include "attention/params.h"
#include "core/fp8.cuh"
#include "core/math.cuh"
#include "core/mma.cuh"

namespace flashinfer {
namespace attention {

// What a cache holds: its element, and the columns of a key and of a value that a tile has room for.
template <typename Element_, int kHeadDim_, int kHeadDimVo_>
struct KeyValue {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
};

// A matrix of 16 bits an element in shared memory.
template <typename Element, int kColumns, bool kNarrow = sizeof(Element) == 1>
struct SharedRows {
  static constexpr int kChunkElements = 16 / sizeof(Element);
  static constexpr int kChunks = kColumns / kChunkElements;  // 16-byte chunks of a row
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kPitch = kSwizzled ? kChunks : kChunks | 1;  // from row to row, in chunks

  uint8_t* data;

  __device__ void* chunk(int row, int chunk) const {
    return data + (row * kPitch + (kSwizzled ? chunk ^ (row & 7) : chunk)) * 16;
  }

  // Four elements from `column` on, a multiple of four.
  __device__ void* four(int row, int column) const {
    return static_cast<Element*>(chunk(row, column / kChunkElements)) + column % kChunkElements;
  }

  // The shared address of half a row of the 16 x 16 block at `row`, a multiple of 16, and column 16 * step. A swizzled
  // chunk's place depends on three bits of row and chunk only, and matrices begin at a multiple of 128 bytes: so what
  // depends on the lane is computed once, and leads to all blocks by constants.
  __device__ uint32_t block(int row, int lane_row, int half, int step) const {
    const uint32_t first = shared_address(data) + (lane_row * kPitch + (kSwizzled ? half ^ (lane_row & 7) : half)) * 16;
    const int offset = row * kPitch * 16;
    return kSwizzled ? (first ^ (step % 4 * 32)) + step / 4 * 128 + offset : first + step * 32 + offset;
  }

  // Rows [row, row + 16) and columns [16 * step, +16) as operand A.
  __device__ void load(FragmentA& a, int row, int step, int lane) const {
    load_matrix(a.x, block(row, lane % 16, lane / 16, step));
  }

  // The same for operands B that are loaded from 8-bit rows: lane l has columns 4 * (l % 4) to 4 * (l % 4) + 3.
  __device__ void load_fours(FragmentA& a, int row, int step, int lane) const {
    const int column = 16 * step + lane % 4 * 4;
    const auto* upper = static_cast<const uint2*>(four(row + lane / 4, column));
    const auto* lower = static_cast<const uint2*>(four(row + lane / 4 + 8, column));
    a = {{upper->x, lower->x, upper->y, lower->y}};
  }

  // The transpose of rows [row, row + 16) and columns [16 * step, +16) as two operands B of 8 columns: Q K^T.
  __device__ void load_transposed(FragmentB (&b)[2], int row, int step, int lane) const {
    uint32_t x[4];
    load_matrix(x, block(row, lane % 8 + lane / 16 * 8, lane / 8 % 2, step));
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }

  // Rows [row, row + 16) and columns [16 * block, +16) as two operands B of 8 columns: P V.
  __device__ void load(FragmentB (&b)[2], int row, int block, int lane) const {
    uint32_t x[4];
    load_matrix_transposed(x, this->block(row, lane % 16, lane / 16, block));
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }
};

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// What tensor cores multiply: the type of q, or fp16, which holds every fp8 exactly and probabilities better than bf16.
template <typename T, bool kNarrow>
struct Operands {
  using Type = T;
};
template <typename T>
struct Operands<T, true> {
  using Type = f16;
};

// The same of 8 bits, which become fp16 in registers. `ldmatrix` moves pairs of 8-bit elements as if they were one, so
// a lane gets others than the product's layout has for it. Nothing is moved between lanes for that: a sum does not
// depend on the order of its terms, nor a product on that of its columns.
template <typename Element, int kColumns>
struct SharedRows<Element, kColumns, true> : SharedRows<Element, kColumns, false> {
  // Q K^T: a lane's terms are columns 4 * (l % 4) to + 3 of a row, for which Q is loaded by `load_fours`.
  __device__ void load_transposed(FragmentB (&b)[2], int row, int step, int lane) const {
    uint32_t x[2];
    load_matrix(x, shared_address(this->chunk(row + lane % 16, step)));
    for (int i = 0; i < 2; ++i)
      b[i] = {{Fp8<Element>::template pair<0, 1>(x[i]), Fp8<Element>::template pair<2, 3>(x[i])}};
  }

  // P V: a transposed pair is two columns of one row. The first operand takes the even columns of sixteen, the second
  // the odd ones; `deal_columns` brings their results together.
  __device__ void load(FragmentB (&b)[2], int row, int block, int lane) const {
    uint32_t x[2];
    load_matrix_transposed(x, shared_address(this->chunk(row + lane % 16, block)));
    b[0] = {{Fp8<Element>::template pair<0, 2>(x[0]), Fp8<Element>::template pair<0, 2>(x[1])}};
    b[1] = {{Fp8<Element>::template pair<1, 3>(x[0]), Fp8<Element>::template pair<1, 3>(x[1])}};
  }
};

template <typename KeyValue, int kRows_, int kKeys_, int kWarps_>
struct Tile {
  using Element = typename KeyValue::Element;
  static constexpr int kHeadDim = KeyValue::kHeadDim;
  static constexpr int kHeadDimVo = KeyValue::kHeadDimVo;
  static constexpr bool kNarrow = sizeof(Element) == 1;
  static constexpr int kRows = kRows_;  // packed query rows
  static constexpr int kKeys = kKeys_;  // keys of one step
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = 2;                                        // K and V tiles: one in use, one in flight
  static constexpr int kQueryBuffers = kRows == 16 && kWarps > 1 ? 2 : 1;  // small ones are fetched ahead like K and V

  using Queries = SharedRows<f16, kHeadDim>;
  using Keys = SharedRows<Element, kHeadDim>;
  using Values = SharedRows<Element, kHeadDimVo>;

  // A tile of 16 rows gives each warp a slice of the keys; larger ones give each warp a slice of the rows.
  static constexpr int kWarpsOverRows = kRows == 16 ? 1 : kWarps;
  static constexpr int kWarpsOverKeys = kWarps / kWarpsOverRows;
  static constexpr int kWarpKeys = kKeys / kWarpsOverKeys;
  static constexpr int kRowBlocks = kRows / kWarpsOverRows / 16;  // 16-row fragments of a warp
  static constexpr int kKeyBlocks = kWarpKeys / 8;                // 8-key accumulators of a warp
  static constexpr int kDimBlocks = kHeadDimVo / 8;               // 8-column accumulators of the output

  // As many neighbouring lanes copy a row of K as one of V, so that one lane finds both: at most eight, whose request
  // is a line, so that what a row costs is paid for several chunks. Sixteen where there are more threads than that
  // needs.
  static constexpr int kAnyChunks = Keys::kChunks | Values::kChunks | (kThreads > 8 * kKeys ? 16 : 8);
  static constexpr int kLanesPerRow = kAnyChunks & -kAnyChunks;  // the largest power of two that divides them
  static constexpr int kRowsPerWarpPass = 32 / kLanesPerRow;
  static constexpr int kRowsPerPass = kWarps * kRowsPerWarpPass;

  static_assert(kWarpKeys % 16 == 0 && kRowBlocks * 16 * kWarpsOverRows == kRows, "fragments tile the warp's slice");
  static_assert(kKeys % kRowsPerPass == 0, "copies tile the keys");
};

// The parts of a CTA's shared memory: queries, then K and V of each stage, then the states that warps exchange, then
// what rotation and narrow keys need.
template <typename Tile>
struct SharedTile {
  uint8_t* base;

  __device__ typename Tile::Queries q(int buffer) const { return {base + buffer * kQueryBytes}; }
  __device__ typename Tile::Keys k(int stage) const { return {base + kStagesOffset + stage * kStageBytes}; }
  __device__ typename Tile::Values v(int stage) const { return {k(stage).data + kKeyBytes}; }

  // Where warps that saw different keys exchange their sums of values: a stage that is not in use.
  __device__ float* values(int stage) const { return reinterpret_cast<float*>(k(stage).data); }
  __device__ float* states() const { return reinterpret_cast<float*>(base + kStatesOffset); }

  // Where keys are narrow: what each query row was divided by. Where they are rotated: how many turns a position is,
  // for each pair of columns, and room for the keys of a stage that are too narrow to be rotated in place.
  __device__ float* row_scales() const { return reinterpret_cast<float*>(base + kExtraOffset); }
  __device__ float2* turns() const { return reinterpret_cast<float2*>(base + kExtraOffset + kScaleBytes); }
  __device__ SharedRows<f16, Tile::kHeadDim> rotated_keys(int stage) const {
    return {Tile::kNarrow ? base + kExtraOffset + kScaleBytes + 4 * Tile::kHeadDim : k(stage).data};
  }

 private:
  static constexpr int kQueryBytes = Tile::kRows * Tile::Queries::kPitch * 16;
  static constexpr int kKeyBytes = Tile::kKeys * Tile::Keys::kPitch * 16;
  static constexpr int kStageBytes = kKeyBytes + Tile::kKeys * Tile::Values::kPitch * 16;
  static constexpr int kStagesOffset = Tile::kQueryBuffers * kQueryBytes;
  static constexpr int kStatesOffset = kStagesOffset + Tile::kStages * kStageBytes;
  static constexpr int kExtraOffset = kStatesOffset + (Tile::kWarpsOverKeys > 1 ? Tile::kWarps * 128 : 0);
  static constexpr int kScaleBytes = !Tile::kNarrow ? 0 : Tile::kRows <= 32 ? 128 : Tile::kRows * 4;
  static_assert(Tile::kWarpsOverKeys == 1 || Tile::kWarps * 16 * Tile::kHeadDimVo * 4 <= kStageBytes,
                "the values fit a stage");
};

// Divides packed rows by the heads of a group, which mostly are a power of two.
struct Group {
  int32_t size;
  int32_t shift;  // -1: `size` is no power of two

  __device__ explicit Group(int32_t heads)
      : size(computed_here(heads)), shift(size & (size - 1) ? -1 : 31 - __clz(size)) {}

  __device__ int32_t query(int32_t row) const { return shift >= 0 ? row >> shift : row / size; }
};

// The query rows of one work item: packed row r is query r / group, head r % group of the KV head.
struct QueryRows {
  const WorkItem& item;
  Group group;

  __device__ QueryRows(const WorkItem& work_item, int32_t heads) : item(work_item), group(heads) {}

  // Rows past the last of the request are computed with the others of the tile, and left out.
  __device__ bool exists(int row) const { return item.row_begin + row < item.q_len * group.size; }
  __device__ int32_t query(int row) const { return group.query(item.row_begin + row); }
  __device__ int32_t position(int32_t query) const { return query + item.kv_len - item.q_len; }
  __device__ int64_t token(int row) const { return static_cast<int64_t>(item.q_start) + query(row); }
  __device__ int32_t head(int row) const {
    return item.kv_head * group.size + item.row_begin + row - query(row) * group.size;
  }

  // One past the last key that the row sees in this piece.
  __device__ int32_t key_limit(int row, int32_t causal) const {
    return causal ? min(item.kv_end, position(query(row)) + 1) : item.kv_end;
  }
};

}  // namespace attention
}  // namespace flashinfer
