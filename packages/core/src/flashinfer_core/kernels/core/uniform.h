// The work of a single request in closed form: item and merge `index`, computed where they are needed.
#pragma once

#include "core/tiles.h"
#include "core/work.h"

namespace flashinfer {

// Item `index` of [0, kv_heads * tiles * pieces) of one request that starts at row 0 of q and entry 0 of the cache.
// Tiles run from the last to the first: under a causal mask these are the longest, and the tail stays short.
FLASHINFER_HOST_DEVICE inline WorkItem uniform_item(const UniformWork& work, int32_t group, int32_t kv_heads,
                                                    int32_t tile_rows, int32_t kv_tile, int32_t index) {
  const int32_t piece = index % work.pieces;
  const int32_t kv_head = index / work.pieces % kv_heads;
  const int32_t tile = work.tiles - 1 - index / work.pieces / kv_heads;
  const int32_t row_begin = tile * tile_rows;
  const int32_t visible = visible_keys(work.q_len, work.kv_len, group, tile_rows, work.causal, row_begin);
  const int32_t first = first_key(work.q_len, work.kv_len, group, work.window_left, row_begin) / kv_tile * kv_tile;
  const int64_t begin = first + int64_t(piece) * work.piece_len;
  const int64_t end = begin + work.piece_len;
  const int32_t kv_begin = int32_t(begin < visible ? begin : visible);
  const int32_t kv_end = int32_t(end < visible ? end : visible);
  const int32_t merge = kv_head * work.tiles + tile;
  if (work.pieces == 1)
    return WorkItem{0, work.q_len, 0, work.kv_len, kv_head, row_begin, kv_begin, kv_end, -1, 0, -1, 0};
  const int32_t partial = (merge * work.pieces + piece) * tile_rows;
  return WorkItem{0, work.q_len, 0, work.kv_len, kv_head, row_begin, kv_begin, kv_end, partial, 0, merge, 0};
}

// Merge `index` of [0, kv_heads * tiles) of the same request.
FLASHINFER_HOST_DEVICE inline MergeItem uniform_merge(const UniformWork& work, int32_t group, int32_t tile_rows,
                                                      int32_t index) {
  const int32_t kv_head = index / work.tiles;
  const int32_t row_begin = index % work.tiles * tile_rows;
  const int32_t rows = smaller(tile_rows, work.q_len * group - row_begin);
  return MergeItem{0, work.q_len, kv_head, row_begin, rows, index * work.pieces * tile_rows, work.pieces, 0};
}

}  // namespace flashinfer
