// Where a plan goes, and how the items of one tile are written into it.
#pragma once

#include "core/cuts.h"
#include "core/work.h"

namespace flashinfer {

struct PlanBuffers {
  int32_t* worker_indptr;  // [workers + 1], into items
  int32_t* num_merges;     // [1]
  MergeItem* merges;
  int32_t* arrivals;  // of each merge: 0 when the plan arrives; who counts in it leaves 0 behind
  WorkItem* items;
  int32_t max_pieces;  // of cut tiles, for which the partial buffers have room: tile_rows rows each
};

// A tile, and where its first item and its first piece go.
struct PlanPlace {
  int32_t item;
  int32_t piece;
  int32_t merge;
};

// Writes the items of whole tiles and of cut ones.
struct PlanWriter {
  const PlanShape& shape;
  const PlanBuffers& out;

  FLASHINFER_HOST_DEVICE static WorkItem item(const PlanRequest& r, int32_t request, int32_t kv_head,
                                              int32_t row_begin) {
    return WorkItem{r.q_start, r.q_len, r.kv_start, r.kv_len, kv_head, row_begin, 0, 0, -1, request, -1, 0};
  }

  // A tile of each of `heads` KV heads, from that of `whole` on.
  FLASHINFER_HOST_DEVICE void write_whole(const WorkItem& tile, const TileKeys& keys, int32_t heads, int32_t to) const {
    WorkItem* const item = out.items + to;
    for (int32_t i = 0; i < heads; ++i) {
      item[i].q_start = tile.q_start;
      item[i].q_len = tile.q_len;
      item[i].kv_start = tile.kv_start;
      item[i].kv_len = tile.kv_len;
      item[i].kv_head = tile.kv_head + i;
      item[i].row_begin = tile.row_begin;
      item[i].kv_begin = keys.begin * shape.kv_tile;
      item[i].kv_end = keys.visible;
      item[i].partial = -1;
      item[i].request = tile.request;
      item[i].merge = -1;
      item[i].pad = 0;
    }
  }

  // Piece `index` of a tile: its key tiles [begin, end).
  FLASHINFER_HOST_DEVICE void write_piece(WorkItem piece, const TileKeys& keys, int32_t begin, int32_t end,
                                          const PlanPlace& place, int32_t index) const {
    piece.kv_begin = (keys.begin + begin) * shape.kv_tile;
    piece.kv_end = end == keys.count(shape.kv_tile) ? keys.visible : (keys.begin + end) * shape.kv_tile;
    piece.partial = (place.piece + index) * shape.tile_rows;
    piece.merge = place.merge;
    out.items[place.item + index] = piece;
  }

  FLASHINFER_HOST_DEVICE void write_merge(const WorkItem& tile, const PlanPlace& place, int32_t pieces) const {
    const int32_t rows = smaller(shape.tile_rows, tile.q_len * shape.group - tile.row_begin);
    const int32_t partial = place.piece * shape.tile_rows;
    out.merges[place.merge] =
        MergeItem{tile.q_start, tile.q_len, tile.kv_head, tile.row_begin, rows, partial, pieces, 0};
    out.arrivals[place.merge] = 0;
  }

  FLASHINFER_HOST_DEVICE void write_fixed(const WorkItem& tile, const TileKeys& keys, int32_t piece,
                                          const PlanPlace& place) const {
    const int32_t span = keys.count(shape.kv_tile);
    const int32_t pieces = pieces_of(span, piece);
    if (pieces == 1) return write_whole(tile, keys, 1, place.item);
    for (int32_t i = 0; i < pieces; ++i) {
      write_piece(tile, keys, i * piece, smaller((i + 1) * piece, span), place, i);
    }
    write_merge(tile, place, pieces);
  }

  // The tile of `next` and of those cuts after it that are in the same tile, after `done` others; returns the cut
  // after.
  FLASHINFER_HOST_DEVICE const PlanCut* write_cut(const WorkItem& tile, const TileKeys& keys, const PlanCut* next,
                                                  const PlanCut* last, int32_t done) const {
    const int32_t index = next->tile;
    const PlanPlace place = {index + done, done + next->merge, next->merge};
    int32_t count = 0, begin = 0;
    for (; next < last && next->tile == index; ++next) {
      write_piece(tile, keys, begin, next->at, place, count++);
      begin = next->at;
    }
    write_piece(tile, keys, begin, keys.count(shape.kv_tile), place, count);
    write_merge(tile, place, count + 1);
    return next;
  }
};

}  // namespace flashinfer
