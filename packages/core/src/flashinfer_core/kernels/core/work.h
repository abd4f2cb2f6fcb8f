// The work of attention as data: what one worker does next, and what is merged afterwards.
//
// Query heads that share a KV head are packed into rows: packed row r of a request is query r / group, head r % group
// of that KV head. A work item is one tile of packed rows against one range of keys.
#pragma once

#include "core/types.h"

namespace flashinfer {

struct WorkItem {
  int32_t q_start;    // first token of the request in q and o
  int32_t q_len;      // query tokens of the request
  int32_t kv_start;   // ragged: first row of the request in k and v; paged: its first entry in page_table
  int32_t kv_len;     // keys of the request
  int32_t kv_head;    // KV head
  int32_t row_begin;  // first packed row of the tile; the tile ends at min(row_begin + tile_rows, q_len * group)
  int32_t kv_begin;   // first key of this piece, a multiple of the key tile
  int32_t kv_end;     // one past the last key of this piece; equal to kv_begin where no key is visible
  int32_t partial;    // first of tile_rows rows of this piece in the partial buffers; -1: whole, write o and lse
  int32_t request;    // of the batch
  int32_t merge;      // which MergeItem this piece belongs to; -1: whole
  int32_t pad;
};
static_assert(sizeof(WorkItem) == 48, "host and device disagree on WorkItem");

struct MergeItem {
  int32_t q_start;  // as in WorkItem
  int32_t q_len;
  int32_t kv_head;
  int32_t row_begin;  // first packed row of the tile
  int32_t rows;       // packed rows of the tile
  int32_t partial;    // first partial row; piece s holds `rows` rows from partial + s * tile_rows
  int32_t pieces;     // number of pieces to merge, at least 2
  int32_t pad;
};
static_assert(sizeof(MergeItem) == 32, "host and device disagree on MergeItem");

// One request split evenly, described by value: needs no memory on the device, so it can be captured in a CUDA graph.
struct UniformWork {
  int32_t q_len;
  int32_t kv_len;
  int32_t tiles;      // tiles of packed rows in a KV head
  int32_t pieces;     // KV pieces of every tile; 1: whole
  int32_t piece_len;  // keys of a piece, a multiple of the KV tile
  int32_t causal;
  int32_t window_left;  // as in AttentionParams
};
static_assert(sizeof(UniformWork) == 28, "host and device disagree on UniformWork");

}  // namespace flashinfer
