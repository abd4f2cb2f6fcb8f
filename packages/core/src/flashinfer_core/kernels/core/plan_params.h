// What the planning kernel takes: lengths that lie on the device, and where the plan goes.
#pragma once

#include "core/types.h"

namespace flashinfer {

struct PlanParams {
  const int32_t* q_indptr;   // [requests + 1]; null: one query each
  const int32_t* kv_indptr;  // [requests + 1]: ragged rows or page-table entries
  const int32_t* keys;       // [requests]: keys, or those in each request's last page; null: all rows
  int32_t* lengths;          // [3 * requests + 2]: q_indptr, kv_indptr and kv_len as the plan has them
  void* before;              // PlanSums [requests + 1], and two arrays for each worker: what the steps tell each other
  void* ends;                // WorkerEnd [workers]
  void* cuts;                // PlanCut [workers]
  int32_t* worker_indptr;    // these five as in PlanBuffers
  int32_t* num_merges;
  void* merges;
  int32_t* arrivals;
  void* items;
  int32_t max_items;
  int32_t max_merges;
  int32_t max_pieces;
  int32_t num_requests;
  int32_t max_queries;  // of a request,
  int32_t max_tokens;   // and of all
  int32_t page_size;    // 1 where ragged
  int32_t last_pages;   // 1: `keys` counts those in the last page
  int32_t group;        // these eight as in PlanShape
  int32_t kv_heads;
  int32_t tile_rows;
  int32_t kv_tile;
  int32_t causal;
  int32_t window_left;
  int32_t num_workers;
  int32_t fixed_piece;
};
static_assert(sizeof(PlanParams) == 160, "host and device disagree on PlanParams");

}  // namespace flashinfer
