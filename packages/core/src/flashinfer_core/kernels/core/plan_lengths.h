// A plan from lengths as callers have them, by a team: what the kernel of plan.cuh does, and tests with threads.
//
// Nobody on the host sees these lengths, so nothing can be raised: a batch that makes no sense, or is beyond the maxima
// that it was announced with, gets a plan without work, and nothing is written out of bounds.
#pragma once

#include "core/plan.h"
#include "core/plan_params.h"

namespace flashinfer {

// The keys of a request; -1 where its lengths make no sense.
FLASHINFER_HOST_DEVICE inline int32_t keys_of(const PlanParams& p, int32_t request) {
  const int64_t rows = int64_t(p.kv_indptr[request + 1]) - p.kv_indptr[request];
  int64_t keys = rows;
  int64_t most = rows * p.page_size;
  if (p.keys != nullptr && rows > 0) {
    keys = p.keys[request];
    if (p.last_pages) {
      if (keys > p.page_size) return -1;
      keys += (rows - 1) * p.page_size;
      if (keys <= (rows - 1) * p.page_size) return -1;
    }
  } else if (p.keys != nullptr && !p.last_pages) {
    keys = p.keys[request];
  }
  const int64_t limit = int64_t(2147483647) - p.kv_tile;
  return p.kv_indptr[request] < 0 || keys < 0 || keys > most || keys > limit ? -1 : int32_t(keys);
}

// Writes this thread's part of p.lengths; returns how many of its requests make no sense.
template <class Team>
FLASHINFER_HOST_DEVICE int32_t write_lengths(const Team& team, const PlanParams& p) {
  int32_t* const q_indptr = p.lengths;
  int32_t* const kv_indptr = q_indptr + p.num_requests + 1;
  int32_t* const kv_len = kv_indptr + p.num_requests + 1;
  const Range mine = share_of(team, p.num_requests);
  int32_t wrong = 0;
  for (int32_t i = mine.begin; i < mine.end; ++i) {
    const int32_t q_begin = p.q_indptr == nullptr ? i : p.q_indptr[i];
    const int32_t q_end = p.q_indptr == nullptr ? i + 1 : p.q_indptr[i + 1];
    q_indptr[i + 1] = q_end;
    kv_indptr[i + 1] = p.kv_indptr[i + 1];
    kv_len[i] = keys_of(p, i);
    wrong += q_begin < 0 || q_end < q_begin || q_end > p.max_tokens || q_end - q_begin > p.max_queries || kv_len[i] < 0;
  }
  if (team.index() == 0) {
    q_indptr[0] = p.q_indptr == nullptr ? 0 : p.q_indptr[0];
    kv_indptr[0] = p.kv_indptr[0];
    wrong += q_indptr[0] != 0;
  }
  return wrong;
}

struct Count {
  int32_t value = 0;

  FLASHINFER_HOST_DEVICE void add(const Count& other) { value += other.value; }
};

template <class Team>
FLASHINFER_HOST_DEVICE void write_no_work(const Team& team, const PlanParams& p) {
  const Range mine = share_of(team, p.num_workers + 1);
  for (int32_t i = mine.begin; i < mine.end; ++i) p.worker_indptr[i] = 0;
  if (team.index() == 0) *p.num_merges = 0;
}

template <class Team>
FLASHINFER_HOST_DEVICE void plan_lengths(const Team& team, const PlanParams& p) {
  const PlanShape shape = {p.group,  p.kv_heads,    p.tile_rows,   p.kv_tile,
                           p.causal, p.window_left, p.num_workers, p.fixed_piece};
  const int32_t* const kv_indptr = p.lengths + p.num_requests + 1;
  const PlanLengths lengths = {p.lengths, kv_indptr, kv_indptr + p.num_requests + 1, p.num_requests};
  const PlanScratch scratch = {static_cast<PlanSums*>(p.before), static_cast<WorkerEnd*>(p.ends),
                               static_cast<PlanCut*>(p.cuts)};
  const PlanBuffers out = {
      p.worker_indptr, p.num_merges, static_cast<MergeItem*>(p.merges), p.arrivals, static_cast<WorkItem*>(p.items),
      p.max_pieces};
  if (team.total(Count{write_lengths(team, p)}).value > 0) return write_no_work(team, p);
  const PlanSums sums = sum_requests(team, shape, lengths, scratch);
  const PlanCounts most = most_counts(shape, sums, p.max_pieces);
  if (sums.tiles < 0 || most.items > p.max_items || most.merges > p.max_merges || most.pieces > p.max_pieces) {
    return write_no_work(team, p);
  }
  write_plan(team, shape, lengths, sums, scratch, out);
}

}  // namespace flashinfer
