// Tiles of packed rows: how many a request has, which keys the rows of one see, and what tiles cost.
//
// The first and the last key tile of a tile are floors of linear functions of its number, so that the cost of all tiles
// before one is a sum in closed form: nobody walks the tiles of a long request.
#pragma once

#include "core/types.h"

namespace flashinfer {

struct PlanShape {
  int32_t group;  // query heads of a KV head
  int32_t kv_heads;
  int32_t tile_rows;    // packed rows of a tile
  int32_t kv_tile;      // keys of a tile; pieces begin and end at its multiples
  int32_t causal;       // 1: query i sees keys up to i + kv_len - q_len
  int32_t window_left;  // query i sees keys from i + kv_len - q_len - window_left on; -1: from 0
  int32_t num_workers;
};

FLASHINFER_HOST_DEVICE inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// Written so that it cannot overflow: a >= 0, b >= 1.
FLASHINFER_HOST_DEVICE inline int32_t ceil_div(int32_t a, int32_t b) { return a / b + (a % b != 0); }

FLASHINFER_HOST_DEVICE inline int32_t tiles_of(int32_t q_len, int32_t group, int32_t tile_rows) {
  const int32_t rows = q_len * group;
  return rows <= tile_rows ? rows > 0 : ceil_div(rows, tile_rows);  // decode needs no division
}

// The first key that the first row of a tile sees where that is before `visible`; no row of the tile sees one before.
FLASHINFER_HOST_DEVICE inline int32_t first_key(int32_t q_len, int32_t kv_len, int32_t group, int32_t window_left,
                                                int32_t row_begin) {
  if (window_left < 0) return 0;
  const int64_t first = int64_t(kv_len) - q_len + row_begin / group - window_left;
  return first < 0 ? 0 : int32_t(first);
}

// One past the last key that the last row of a tile sees; every row of the tile sees no more.
FLASHINFER_HOST_DEVICE inline int32_t visible_keys(int32_t q_len, int32_t kv_len, int32_t group, int32_t tile_rows,
                                                   int32_t causal, int32_t row_begin) {
  if (!causal) return kv_len;
  const int64_t row_end = int64_t(row_begin) + tile_rows;
  const int64_t rows = int64_t(q_len) * group;
  const int64_t last_query = row_end < rows ? (row_end - 1) / group : int64_t(q_len) - 1;
  const int64_t seen = int64_t(kv_len) - q_len + last_query + 1;
  return seen < 0 ? 0 : int32_t(seen < kv_len ? seen : kv_len);
}

// Key tiles [begin, end) of a tile; the last one is seen up to key `visible`.
struct TileKeys {
  int32_t begin;
  int32_t end;
  int32_t visible;

  FLASHINFER_HOST_DEVICE int32_t count() const { return end - begin; }
};

FLASHINFER_HOST_DEVICE inline TileKeys tile_keys(const PlanShape& shape, int32_t q_len, int32_t kv_len,
                                                 int32_t row_begin) {
  const int32_t visible = visible_keys(q_len, kv_len, shape.group, shape.tile_rows, shape.causal, row_begin);
  const int32_t first = first_key(q_len, kv_len, shape.group, shape.window_left, row_begin);
  return {first / shape.kv_tile, ceil_div(visible, shape.kv_tile), visible};
}

}  // namespace flashinfer
