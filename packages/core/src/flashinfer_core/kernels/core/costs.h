// What tiles cost: the model that plans balance, and its sums over all tiles before one.
//
// The first and the last key tile of a tile are floors of linear functions of its number, so their sums have a closed
// form: nobody walks the tiles of a long request.
#pragma once

#include "core/tiles.h"

namespace flashinfer {

// Of starting an item, in key tiles: queries are loaded, the result is written.
constexpr int32_t kStartCost = 1;
// Items of a request beyond which pieces of fixed length are made longer.
constexpr int32_t kMostFixedItems = 256;

struct PlanShape {
  int32_t group;  // query heads of a KV head
  int32_t kv_heads;
  int32_t tile_rows;    // packed rows of a tile
  int32_t kv_tile;      // keys of a tile; pieces begin and end at its multiples
  int32_t causal;       // 1: query i sees keys up to i + kv_len - q_len
  int32_t window_left;  // query i sees keys from i + kv_len - q_len - window_left on; -1: from 0
  int32_t num_workers;
  int32_t fixed_piece;  // key tiles of a piece, whatever else is in the batch; 0: pieces follow the workers
};

struct PlanRequest {
  int32_t q_start, q_len, kv_start, kv_len;
  int32_t tiles;  // of a KV head
};

// What the rows of a tile see: from key tile `begin` up to key `visible`.
struct TileKeys {
  int32_t begin;
  int32_t visible;

  FLASHINFER_HOST_DEVICE int32_t count(int32_t kv_tile) const { return ceil_div(visible, kv_tile) - begin; }
};

FLASHINFER_HOST_DEVICE inline TileKeys tile_keys(const PlanShape& shape, const PlanRequest& request, int32_t tile) {
  const int32_t row_begin = tile * shape.tile_rows;
  const int32_t visible =
      visible_keys(request.q_len, request.kv_len, shape.group, shape.tile_rows, shape.causal, row_begin);
  const int32_t first = first_key(request.q_len, request.kv_len, shape.group, shape.window_left, row_begin);
  return {first > 0 ? first / shape.kv_tile : 0, visible};  // most begin at key 0, and divisions take long
}

FLASHINFER_HOST_DEVICE inline int32_t key_tiles(const PlanShape& shape, const PlanRequest& request, int32_t tile) {
  return tile_keys(shape, request, tile).count(shape.kv_tile);
}

// The sum of floor((offset + slope * i) / divisor) over 0 <= i < count; nothing is negative. As Euclid's algorithm.
FLASHINFER_HOST_DEVICE inline int64_t floor_sum(int64_t count, int64_t slope, int64_t offset, int64_t divisor) {
  int64_t sum = 0;
  while (count > 0) {
    sum += count * (count - 1) / 2 * (slope / divisor) + count * (offset / divisor);
    slope %= divisor;
    offset %= divisor;
    const int64_t top = slope * count + offset;
    count = top / divisor;  // how often the line crosses a multiple; now these are summed instead
    offset = top % divisor;
    const int64_t swapped = slope;
    slope = divisor;
    divisor = swapped;
  }
  return sum;
}

// The same where offset may be negative: negative terms count as 0.
FLASHINFER_HOST_DEVICE inline int64_t clamped_floor_sum(int64_t count, int64_t slope, int64_t offset, int64_t divisor) {
  const int64_t first = offset < 0 ? (-offset + slope - 1) / slope : 0;
  return first < count ? floor_sum(count - first, slope, offset + first * slope, divisor) : 0;
}

// Key tiles of the first `tiles` tiles of a request, for one KV head.
FLASHINFER_HOST_DEVICE inline int64_t key_tiles_before(const PlanShape& shape, const PlanRequest& request,
                                                       int32_t tiles) {
  if (tiles == 1) return key_tiles(shape, request, 0);
  const int64_t all = ceil_div(request.kv_len, shape.kv_tile);
  const int64_t group = shape.group, rows = shape.tile_rows, divisor = group * shape.kv_tile;
  const int64_t position = int64_t(request.kv_len) - request.q_len;  // of the first query
  int64_t ends = all * tiles;
  if (shape.causal && tiles > 0) {
    const int64_t inner = tiles < request.tiles ? tiles : tiles - 1;  // the last tile may have fewer rows
    ends = clamped_floor_sum(inner, rows, (position + shape.kv_tile) * group + rows - 1, divisor);
    ends += inner < tiles ? all : 0;
  }
  if (shape.window_left < 0) return ends;
  return ends - clamped_floor_sum(tiles, rows, (position - shape.window_left) * group, divisor);
}

FLASHINFER_HOST_DEVICE inline int64_t cost_before(const PlanShape& shape, const PlanRequest& request, int32_t tiles) {
  return key_tiles_before(shape, request, tiles) + int64_t(tiles) * kStartCost;
}

// The tile, among those of one KV head, that holds unit `cost` of their cost; `cost` becomes the unit of that tile.
FLASHINFER_HOST_DEVICE inline int32_t tile_at_cost(const PlanShape& shape, const PlanRequest& request, int64_t& cost) {
  int32_t tile = 0;
  for (int32_t end = request.tiles; end - tile > 1;) {
    const int32_t middle = tile + (end - tile) / 2;
    (cost_before(shape, request, middle) <= cost ? tile : end) = middle;
  }
  if (tile > 0) cost -= cost_before(shape, request, tile);
  return tile;
}

// Key tiles of each piece where pieces are fixed. It depends on the request alone: so do the bits of its result.
FLASHINFER_HOST_DEVICE inline int32_t fixed_piece(const PlanShape& shape, const PlanRequest& request) {
  const int64_t pieces = kMostFixedItems / (int64_t(request.tiles) * shape.kv_heads);
  const int32_t all = ceil_div(request.kv_len, shape.kv_tile);
  if (pieces < 2) return all > 0 ? all : 1;
  const int32_t shortest = ceil_div(all, int32_t(pieces));
  return shortest > shape.fixed_piece ? shortest : shape.fixed_piece;
}

}  // namespace flashinfer
