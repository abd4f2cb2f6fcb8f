// From lengths to work: a stream-K schedule over tiles of packed rows, made by one thread or by a CTA.
//
// Sums over requests say where each worker's range ends, the ends say where tiles are cut, and with the cuts known each
// tile's items have their place: every step is dealt to a team, and the plan is the same whatever the team. At most
// workers - 1 tiles are cut, whatever the batch, so buffers follow from maxima; fixed pieces are bounded by the
// request.
#pragma once

#include "core/plan_writer.h"

namespace flashinfer {

struct PlanCounts {
  int32_t items;
  int32_t merges;
  int32_t pieces;  // of all cut tiles; each holds tile_rows rows of the partial buffers
};

// Cuts tiles at the ends of workers: fills scratch.cuts and worker_indptr.
template <class Team>
FLASHINFER_HOST_DEVICE CutCounts cut_at_workers(const Team& team, const PlanShape& shape, const PlanScratch& scratch,
                                                const PlanBuffers& out) {
  const int64_t quantum = fitting_quantum(team, shape.num_workers, scratch.ends, out.max_pieces);
  const Range mine = share_of(team, shape.num_workers);
  const CutCounts own = cut_share(mine, scratch.ends, quantum, [](int32_t, bool, int32_t, const CutCounts&) {});
  const CutCounts earlier = team.exclusive(own);
  cut_share(mine, scratch.ends, quantum, [&](int32_t worker, bool cuts, int32_t at, const CutCounts& through) {
    const WorkerEnd& end = scratch.ends[worker];
    const int32_t index = earlier.cuts + through.cuts;
    if (cuts) scratch.cuts[index - 1] = PlanCut{end.tile, at, earlier.merges + through.merges - 1};
    out.worker_indptr[worker + 1] = end.tile + index + (end.offset > 0 && at >= end.span);
  });
  return team.total(own);
}

FLASHINFER_HOST_DEVICE inline PlanPlace fixed_place(const PlanShape& shape, const PlanRequest& r,
                                                    const PlanSums& before, int32_t kv_head, int32_t tile) {
  PlanSums head, inner;
  add_fixed(shape, r, r.tiles, head);
  add_fixed(shape, r, tile, inner);
  return {before.items + kv_head * head.items + inner.items, before.pieces + kv_head * head.pieces + inner.pieces,
          before.merges + kv_head * head.merges + inner.merges};
}

// Deals fixed pieces to the workers: fills worker_indptr.
template <class Team>
FLASHINFER_HOST_DEVICE void deal_fixed(const Team& team, const PlanShape& shape, const PlanLengths& lengths,
                                       const PlanScratch& scratch, const PlanBuffers& out) {
  const Range mine = share_of(team, shape.num_workers);
  for (int32_t worker = mine.begin; worker < mine.end; ++worker) {
    const WorkerEnd& end = scratch.ends[worker];
    int32_t items = 0;
    if (end.offset > 0) {
      const PlanRequest r = request_at(shape, lengths, end.request);
      const int32_t tile = end.tile - scratch.before[end.request].tiles;
      const int32_t piece = fixed_piece(shape, r), at = cut_at(end, piece);
      items = fixed_place(shape, r, scratch.before[end.request], tile / r.tiles, tile % r.tiles).item +
              (at < end.span ? at / piece : pieces_of(end.span, piece));
    }
    out.worker_indptr[worker + 1] = items;
  }
}

// The tiles [begin, end) of the batch, all of one request.
struct TileRun {
  PlanRequest r;
  int32_t request;
  int32_t first;  // tile of that request
  int32_t begin;
  int32_t end;
};

// Writes tiles that the workers' ends cut, and returns the first cut after them. A request of one tile, as in decode,
// has the same tile for every head.
FLASHINFER_HOST_DEVICE inline const PlanCut* write_run(const PlanWriter& writer, const TileRun& run,
                                                       const PlanCut* cuts, const PlanCut* next, const PlanCut* last) {
  const PlanRequest r = run.r;
  TileKeys keys = tile_keys(writer.shape, r, 0);
  for (int32_t index = run.begin; index < run.end;) {
    const int32_t in_request = index - run.first;
    const int32_t inner = r.tiles == 1 ? 0 : in_request % r.tiles;
    if (r.tiles > 1) keys = tile_keys(writer.shape, r, inner);
    const int32_t kv_head = r.tiles == 1 ? in_request : in_request / r.tiles;
    const WorkItem item = PlanWriter::item(r, run.request, kv_head, inner * writer.shape.tile_rows);
    const int32_t uncut = next < last ? smaller(next->tile, run.end) : run.end;
    const int32_t done = int32_t(next - cuts);
    if (uncut == index) {
      next = writer.write_cut(item, keys, next, last, done);
      ++index;
    } else {
      const int32_t heads = r.tiles == 1 ? uncut - index : 1;
      writer.write_whole(item, keys, heads, index + done);
      index += heads;
    }
  }
  return next;
}

FLASHINFER_HOST_DEVICE inline void write_fixed_run(const PlanWriter& writer, const TileRun& run,
                                                   const PlanSums& before) {
  const PlanRequest& r = run.r;
  const int32_t piece = fixed_piece(writer.shape, r);
  for (int32_t index = run.begin; index < run.end; ++index) {
    const int32_t kv_head = (index - run.first) / r.tiles, inner = (index - run.first) % r.tiles;
    const WorkItem item = PlanWriter::item(r, run.request, kv_head, inner * writer.shape.tile_rows);
    writer.write_fixed(item, tile_keys(writer.shape, r, inner), piece,
                       fixed_place(writer.shape, r, before, kv_head, inner));
  }
}

template <class Team>
FLASHINFER_HOST_DEVICE void write_tiles(const Team& team, const PlanShape& shape, const PlanLengths& lengths,
                                        const PlanScratch& scratch, int32_t num_cuts, const PlanBuffers& out) {
  const PlanWriter writer = {shape, out};
  const PlanSums* const before = scratch.before;
  const Range mine = share_of(team, before[lengths.num_requests].tiles);
  const PlanCut *const cuts = scratch.cuts, *const last = cuts + num_cuts;
  const PlanCut* next = cuts + first_where(0, num_cuts, [&](int32_t i) { return cuts[i].tile >= mine.begin; });
  int32_t request = first_where(0, lengths.num_requests, [&](int32_t i) { return before[i + 1].tiles > mine.begin; });
  for (int32_t index = mine.begin; index < mine.end; ++request) {
    const PlanRequest r = request_at(shape, lengths, request);
    if (r.tiles == 0) continue;
    const int32_t first = before[request].tiles, end = smaller(before[request + 1].tiles, mine.end);
    const bool is_cut = next < last && next->tile < end;
    if (shape.fixed_piece > 0) {
      write_fixed_run(writer, TileRun{r, request, first, index, end}, before[request]);
    } else if (r.tiles > 1 || is_cut) {
      next = write_run(writer, TileRun{r, request, first, index, end}, cuts, next, last);
    } else {  // decode, and most requests of it
      const WorkItem item = PlanWriter::item(r, request, index - first, 0);
      writer.write_whole(item, tile_keys(shape, r, 0), end - index, index + int32_t(next - cuts));
    }
    index = end;
  }
}

// What the plan of a batch with these sums may take at most.
FLASHINFER_HOST_DEVICE inline PlanCounts most_counts(const PlanShape& shape, const PlanSums& sums, int32_t max_pieces) {
  if (shape.fixed_piece > 0) return {sums.items, sums.merges, sums.pieces};
  const int32_t cuts = smaller(shape.num_workers - 1, max_pieces > 0 ? max_pieces - 1 : 0);
  return {sums.tiles + cuts, smaller(cuts, max_pieces / 2), smaller(2 * cuts, max_pieces)};
}

// Writes the plan of a batch that has been summed. The caller has seen that `most_counts` fit.
template <class Team>
FLASHINFER_HOST_DEVICE PlanCounts write_plan(const Team& team, const PlanShape& shape, const PlanLengths& lengths,
                                             const PlanSums& sums, const PlanScratch& scratch, const PlanBuffers& out) {
  find_ends(team, shape, lengths, sums.cost, scratch);
  PlanCounts counts = {sums.items, sums.merges, sums.pieces};
  int32_t num_cuts = 0;
  if (shape.fixed_piece > 0) {
    deal_fixed(team, shape, lengths, scratch, out);
  } else {
    const CutCounts cuts = cut_at_workers(team, shape, scratch, out);
    num_cuts = cuts.cuts;
    counts = {sums.tiles + cuts.cuts, cuts.merges, cuts.pieces()};
  }
  if (team.index() == 0) {
    out.worker_indptr[0] = 0;
    *out.num_merges = counts.merges;
  }
  write_tiles(team, shape, lengths, scratch, num_cuts, out);
  return counts;
}

}  // namespace flashinfer
