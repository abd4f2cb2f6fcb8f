// Where the work is cut: tiles lie end to end, each as long as it costs, and the whole is dealt to the workers evenly.
//
// The end of a worker's range falls into a tile, and the tile is cut at the nearest place that is allowed there: the
// nearest multiple of `quantum` key tiles, or the end of a fixed piece. At its first or last key tile it is no cut.
#pragma once

#include "core/costs.h"
#include "core/team.h"

namespace flashinfer {

struct PlanLengths {
  const int32_t* q_indptr;   // [requests + 1]
  const int32_t* kv_indptr;  // [requests + 1]: ragged rows or page-table entries
  const int32_t* kv_len;     // [requests]
  int32_t num_requests;
};

// Sums over requests, or over tiles, of all KV heads.
struct PlanSums {
  int64_t cost = 0;
  int32_t tiles = 0;
  int32_t items = 0;  // these three only of fixed pieces
  int32_t pieces = 0;
  int32_t merges = 0;

  FLASHINFER_HOST_DEVICE void add(const PlanSums& other) {
    cost += other.cost;
    tiles += other.tiles;
    items += other.items;
    pieces += other.pieces;
    merges += other.merges;
  }
};

// Where the range of a worker ends: unit `offset` of a tile that is `span` key tiles and their start.
struct WorkerEnd {
  int32_t request;
  int32_t tile;  // of the batch, all heads of a request one after another
  int32_t offset;
  int32_t span;
};

// A tile is cut before its key tile `at`.
struct PlanCut {
  int32_t tile;
  int32_t at;
  int32_t merge;
};

struct CutCounts {
  int32_t cuts = 0;
  int32_t merges = 0;  // tiles that are cut

  FLASHINFER_HOST_DEVICE void add(const CutCounts& other) {
    cuts += other.cuts;
    merges += other.merges;
  }
  FLASHINFER_HOST_DEVICE int32_t pieces() const { return cuts + merges; }
};

static_assert(sizeof(PlanSums) == 24 && sizeof(WorkerEnd) == 16 && sizeof(PlanCut) == 12, "as planner.py has them");

// What the threads of a team tell each other.
struct PlanScratch {
  PlanSums* before;  // [requests + 1]
  WorkerEnd* ends;   // [workers]
  PlanCut* cuts;     // [workers]
};

FLASHINFER_HOST_DEVICE inline PlanRequest request_at(const PlanShape& shape, const PlanLengths& lengths,
                                                     int32_t index) {
  const int32_t q_start = lengths.q_indptr[index];
  const int32_t q_len = lengths.q_indptr[index + 1] - q_start;
  return {q_start, q_len, lengths.kv_indptr[index], lengths.kv_len[index],
          tiles_of(q_len, shape.group, shape.tile_rows)};
}

FLASHINFER_HOST_DEVICE inline int32_t pieces_of(int32_t span, int32_t piece) {
  return span <= piece ? 1 : ceil_div(span, piece);
}

// Adds the first `tiles` tiles of a head, cut in fixed pieces. Few of them are: the others belong to long requests.
FLASHINFER_HOST_DEVICE inline void add_fixed(const PlanShape& shape, const PlanRequest& request, int32_t tiles,
                                             PlanSums& sums) {
  const int32_t piece = fixed_piece(shape, request);
  sums.items += tiles;
  if (ceil_div(request.kv_len, shape.kv_tile) <= piece) return;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t pieces = pieces_of(key_tiles(shape, request, tile), piece);
    sums.items += pieces - 1;
    sums.pieces += pieces > 1 ? pieces : 0;
    sums.merges += pieces > 1;
  }
}

FLASHINFER_HOST_DEVICE inline PlanSums sums_of(const PlanShape& shape, const PlanRequest& request) {
  PlanSums sums;
  if (request.tiles == 0) return sums;
  sums.cost = cost_before(shape, request, request.tiles) * shape.kv_heads;
  sums.tiles = request.tiles * shape.kv_heads;
  if (shape.fixed_piece == 0) return sums;
  add_fixed(shape, request, request.tiles, sums);
  sums.items *= shape.kv_heads;
  sums.pieces *= shape.kv_heads;
  sums.merges *= shape.kv_heads;
  return sums;
}

// Fills scratch.before and returns the sums of all requests.
template <class Team>
FLASHINFER_HOST_DEVICE PlanSums sum_requests(const Team& team, const PlanShape& shape, const PlanLengths& lengths,
                                             const PlanScratch& scratch) {
  const Range mine = share_of(team, lengths.num_requests);
  PlanSums own;
  for (int32_t i = mine.begin; i < mine.end; ++i) {
    own.add(sums_of(shape, request_at(shape, lengths, i)));
    scratch.before[i + 1] = own;
  }
  const PlanSums earlier = team.exclusive(own);
  if (team.index() == 0) scratch.before[0] = PlanSums();
  for (int32_t i = mine.begin; i < mine.end && team.index() > 0; ++i) scratch.before[i + 1].add(earlier);
  team.sync();
  return scratch.before[lengths.num_requests];
}

// The first request in [begin, count) that ends beyond `value`; `ends_beyond` is false and then true.
template <class Predicate>
FLASHINFER_HOST_DEVICE int32_t first_where(int32_t begin, int32_t count, const Predicate& ends_beyond) {
  // Nearby requests are asked first: who goes through all workers or tiles in order needs no search.
  int32_t step = 1;
  while (begin + step < count && !ends_beyond(begin + step - 1)) {
    begin += step;
    step *= 2;
  }
  int32_t end = smaller(begin + step, count);
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (ends_beyond(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Finds the ends of the workers' ranges. Ranges differ by at most one.
template <class Team>
FLASHINFER_HOST_DEVICE void find_ends(const Team& team, const PlanShape& shape, const PlanLengths& lengths,
                                      int64_t total, const PlanScratch& scratch) {
  const Range mine = share_of(team, shape.num_workers);
  const int64_t share = total / shape.num_workers, longer = total % shape.num_workers;
  const PlanSums* const before = scratch.before;
  int32_t request = 0;
  for (int32_t worker = mine.begin; worker < mine.end; ++worker) {
    const int64_t through = int64_t(worker) + 1;
    const int64_t end = through * share + (through < longer ? through : longer);
    if (end == 0) {  // fewer units than workers
      scratch.ends[worker] = WorkerEnd{0, 0, 0, 0};
      continue;
    }
    request = first_where(request, lengths.num_requests, [=](int32_t i) { return before[i + 1].cost >= end; });
    const PlanRequest r = request_at(shape, lengths, request);
    const int64_t cost_of_head = (before[request + 1].cost - before[request].cost) / shape.kv_heads;
    const int64_t unit = end - 1 - before[request].cost;  // the last one of this worker
    const int32_t kv_head = int32_t(unit / cost_of_head);
    int64_t offset = unit - kv_head * cost_of_head;
    const int32_t tile = tile_at_cost(shape, r, offset);
    scratch.ends[worker] = WorkerEnd{request, before[request].tiles + kv_head * r.tiles + tile, int32_t(offset + 1),
                                     key_tiles(shape, r, tile)};
  }
  team.sync();
}

// Where a worker's end cuts its tile: 0 and the tile's span are no cuts.
FLASHINFER_HOST_DEVICE inline int32_t cut_at(const WorkerEnd& end, int64_t quantum) {
  int64_t at = end.offset > kStartCost ? end.offset - kStartCost : 0;
  if (quantum > 1 && at < end.span) at = (at + quantum / 2) / quantum * quantum;
  return at < end.span ? int32_t(at) : end.span;
}

// Hands the cuts that fall to this thread to `take(worker, cut or no cut, first of its tile, at)` and counts them.
template <class Take>
FLASHINFER_HOST_DEVICE CutCounts cut_share(const Range& mine, const WorkerEnd* ends, int64_t quantum,
                                           const Take& take) {
  CutCounts counts;
  int32_t tile = -1, before = 0;  // of the worker before
  if (mine.begin > 0) {
    tile = ends[mine.begin - 1].tile;
    before = cut_at(ends[mine.begin - 1], quantum);
  }
  for (int32_t worker = mine.begin; worker < mine.end; ++worker) {
    const WorkerEnd& end = ends[worker];
    const int32_t at = cut_at(end, quantum);
    if (tile != end.tile) before = 0;
    const bool cuts = before < at && at < end.span;
    const bool first = cuts && before == 0;
    counts.add({cuts, first});
    take(worker, cuts, at, counts);
    tile = end.tile;
    before = at;
  }
  return counts;
}

// The smallest quantum found, by doubling and bisection, whose pieces fit `max_pieces`: splits adapt to the buffer.
template <class Team>
FLASHINFER_HOST_DEVICE int64_t fitting_quantum(const Team& team, int32_t num_workers, const WorkerEnd* ends,
                                               int32_t max_pieces) {
  const Range mine = share_of(team, num_workers);
  const auto fit = [&](int64_t quantum) {
    const CutCounts own = cut_share(mine, ends, quantum, [](int32_t, bool, int32_t, const CutCounts&) {});
    return team.total(own).pieces() <= max_pieces;
  };
  if (max_pieces / 2 >= num_workers - 1) return 1;
  int64_t too_small = 0, fits = 1;
  while (!fit(fits)) {  // ends: beyond the longest tile nothing is cut
    too_small = fits;
    fits *= 2;
  }
  while (fits - too_small > 1) {
    const int64_t middle = too_small + (fits - too_small) / 2;
    (fit(middle) ? fits : too_small) = middle;
  }
  return fits;
}

}  // namespace flashinfer
