// Tiles of packed rows: how many a request has, and which keys the rows of one see.
#pragma once

#include "core/types.h"

namespace flashinfer {

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

}  // namespace flashinfer
