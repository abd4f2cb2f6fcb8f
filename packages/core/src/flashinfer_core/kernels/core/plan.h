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

// Writes the tiles of one request from `tile` of it on, at most `count`, and returns how many.
FLASHINFER_HOST_DEVICE inline int32_t write_some(const PlanWriter& writer, const PlanRequest& r, int32_t request,
                                                 int32_t tile, int32_t count, const PlanScratch& scratch,
                                                 const PlanCut* cut, const PlanCut* last, int32_t& cuts) {
  const PlanShape& shape = writer.shape;
  const PlanSums& before = scratch.before[request];
  const bool alone = r.tiles == 1;  // as in decode: then all heads have the same tile
  const int32_t kv_head = alone ? tile : tile / r.tiles;
  const int32_t inner = alone ? 0 : tile % r.tiles;
  const TileKeys keys = tile_keys(shape, r, inner);
  const WorkItem item = PlanWriter::item(r, request, kv_head, inner * shape.tile_rows);
  if (shape.fixed_piece > 0) {
    writer.write_fixed(item, keys, fixed_piece(shape, r), fixed_place(shape, r, before, kv_head, inner));
    return 1;
  }
  const int32_t index = before.tiles + tile;
  const int32_t done = int32_t(cut - scratch.cuts);
  if (cut < last && cut->tile == index) {
    cuts = writer.write_cut(item, keys, cut, last, PlanPlace{index + done, done + cut->merge, cut->merge});
    return 1;
  }
  if (!alone) count = 1;
  if (cut < last) count = smaller(count, cut->tile - index);
  writer.write_whole(item, keys, count, index + done);
  return count;
}

template <class Team>
FLASHINFER_HOST_DEVICE void write_tiles(const Team& team, const PlanShape& shape, const PlanLengths& lengths,
                                        const PlanScratch& scratch, int32_t num_cuts, const PlanBuffers& out) {
  const PlanWriter writer = {shape, out};
  const PlanSums* const before = scratch.before;
  const Range mine = share_of(team, before[lengths.num_requests].tiles);
  const PlanCut* const last = scratch.cuts + num_cuts;
  const PlanCut* cut =
      scratch.cuts + first_where(0, num_cuts, [&](int32_t i) { return scratch.cuts[i].tile >= mine.begin; });
  int32_t request = 0;
  for (int32_t index = mine.begin; index < mine.end;) {
    request = first_where(request, lengths.num_requests, [=](int32_t i) { return before[i + 1].tiles > index; });
    const PlanRequest r = request_at(shape, lengths, request);
    const int32_t end = smaller(before[request + 1].tiles, mine.end);
    while (index < end) {
      int32_t cuts = 0;
      index += write_some(writer, r, request, index - before[request].tiles, end - index, scratch, cut, last, cuts);
      cut += cuts;
    }
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
