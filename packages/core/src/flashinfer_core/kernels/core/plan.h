// From lengths to work: a stream-K schedule over tiles of packed rows.
//
// All tiles are laid end to end, each as long as its key tiles plus one for starting it; the whole is cut into equal
// ranges, one for each worker. So at most workers - 1 tiles are cut, whatever the batch, and buffers follow from
// maxima. Plain functions: g++ compiles them for lengths on the host, NVRTC for lengths on the device.
#pragma once

#include "core/tiles.h"
#include "core/work.h"

namespace flashinfer {

struct PlanLengths {
  const int32_t* q_indptr;   // [requests + 1]
  const int32_t* kv_indptr;  // [requests + 1]: ragged rows or page-table entries
  const int32_t* kv_len;     // [requests]
  int32_t num_requests;
};

struct PlanBuffers {
  int32_t* worker_indptr;  // [workers + 1], into items
  int32_t* num_merges;     // [1]
  MergeItem* merges;       // [workers]
  int32_t* arrivals;       // [workers], of each merge: 0 when the plan arrives; who counts in it leaves 0 behind
  WorkItem* items;         // [tiles of all requests and heads + workers - 1]
};

struct PlanCounts {
  int32_t items;
  int32_t merges;
  int32_t pieces;  // of all cut tiles; each holds tile_rows rows of the partial buffers
};

// One tile of one KV head, and what it costs: `key_tiles`, plus one for starting it.
struct PlanTile {
  int32_t request, q_start, q_len, kv_start, kv_len, kv_head, row_begin;
  TileKeys keys;
  int32_t key_tiles;
};

FLASHINFER_HOST_DEVICE inline PlanTile tile_at(const PlanShape& shape, const PlanLengths& lengths, int32_t request,
                                               int32_t tile) {
  PlanTile t;
  t.request = request;
  t.q_start = lengths.q_indptr[request];
  t.q_len = lengths.q_indptr[request + 1] - t.q_start;
  t.kv_start = lengths.kv_indptr[request];
  t.kv_len = lengths.kv_len[request];
  t.kv_head = 0;
  t.row_begin = tile * shape.tile_rows;
  t.keys = tile_keys(shape, t.q_len, t.kv_len, t.row_begin);
  t.key_tiles = t.keys.count();
  return t;
}

FLASHINFER_HOST_DEVICE inline int64_t total_cost(const PlanShape& shape, const PlanLengths& lengths) {
  int64_t cost = 0;
  for (int32_t request = 0; request < lengths.num_requests; ++request) {
    const int32_t q_len = lengths.q_indptr[request + 1] - lengths.q_indptr[request];
    const int32_t tiles = tiles_of(q_len, shape.group, shape.tile_rows);
    for (int32_t tile = 0; tile < tiles; ++tile) cost += tile_at(shape, lengths, request, tile).key_tiles + 1;
  }
  return cost * shape.kv_heads;
}

// The end of each worker's range of the total cost. Ranges differ by at most one.
struct WorkerRanges {
  int64_t share;
  int64_t longer;  // this many first workers take one more

  FLASHINFER_HOST_DEVICE WorkerRanges(int64_t total, int32_t workers)
      : share(total / workers), longer(total % workers) {}

  FLASHINFER_HOST_DEVICE int64_t end_of(int32_t worker) const {
    const int64_t through = int64_t(worker) + 1;
    return through * share + (through < longer ? through : longer);
  }
};

// Takes what `cut` decides and only counts it.
struct PlanCounter {
  PlanCounts counts = {0, 0, 0};

  FLASHINFER_HOST_DEVICE void whole(const PlanTile&, int32_t heads) { counts.items += heads; }
  FLASHINFER_HOST_DEVICE void piece(const PlanTile&, int32_t, int32_t) {
    ++counts.items;
    ++counts.pieces;
  }
  FLASHINFER_HOST_DEVICE void merge(const PlanTile&, int32_t) { ++counts.merges; }
  FLASHINFER_HOST_DEVICE void end_worker(int32_t) {}
};

// Takes what `cut` decides and writes it.
struct PlanWriter {
  PlanShape shape;
  PlanBuffers out;
  PlanCounts counts = {0, 0, 0};

  FLASHINFER_HOST_DEVICE PlanWriter(const PlanShape& s, const PlanBuffers& buffers) : shape(s), out(buffers) {
    out.worker_indptr[0] = 0;
    for (int32_t i = 0; i < s.num_workers; ++i) out.arrivals[i] = 0;
  }

  FLASHINFER_HOST_DEVICE static WorkItem item(const PlanTile& t, int32_t kv_begin, int32_t kv_end, int32_t partial,
                                              int32_t merge) {
    return WorkItem{t.q_start, t.q_len, t.kv_start, t.kv_len,  t.kv_head, t.row_begin,
                    kv_begin,  kv_end,  partial,    t.request, merge,     0};
  }
  // The first key of key tile `index` of those that the tile sees.
  FLASHINFER_HOST_DEVICE int32_t begin_of(const PlanTile& t, int32_t index) const {
    return (t.keys.begin + index) * shape.kv_tile;
  }
  FLASHINFER_HOST_DEVICE void whole(const PlanTile& t, int32_t heads) {
    WorkItem* const to = out.items + counts.items;
    PlanTile each = t;
    for (int32_t i = 0; i < heads; ++i, ++each.kv_head) to[i] = item(each, begin_of(t, 0), t.keys.visible, -1, -1);
    counts.items += heads;
  }
  FLASHINFER_HOST_DEVICE void piece(const PlanTile& t, int32_t first, int32_t last) {
    const int32_t kv_end = last == t.key_tiles ? t.keys.visible : begin_of(t, last);
    const int32_t partial = counts.pieces++ * shape.tile_rows;
    out.items[counts.items++] = item(t, begin_of(t, first), kv_end, partial, counts.merges);
  }
  FLASHINFER_HOST_DEVICE void merge(const PlanTile& t, int32_t pieces) {
    const int32_t rows = smaller(shape.tile_rows, t.q_len * shape.group - t.row_begin);
    const int32_t partial = (counts.pieces - pieces) * shape.tile_rows;
    out.merges[counts.merges++] = MergeItem{t.q_start, t.q_len, t.kv_head, t.row_begin, rows, partial, pieces, 0};
  }
  FLASHINFER_HOST_DEVICE void end_worker(int32_t worker) { out.worker_indptr[worker + 1] = counts.items; }
};

// Walks the tiles in order and hands each to `sink`, whole or in pieces, between the ends of workers.
//
// A cut falls on the multiple of `quantum` key tiles (of its own tile) that is nearest to the end of the worker's
// range, and becomes no cut where that is the tile's start or end. A worker's load, in key tiles plus one for each of
// its items, so is at most ceil(total / workers) + 1, plus `quantum` where that is more than 1.
template <typename Sink>
struct PlanCutter {
  Sink& sink;
  WorkerRanges ranges;
  int32_t num_workers;
  int64_t quantum;
  int32_t worker = 0;
  int64_t range_end;
  int64_t position = 0;  // start of the current tile

  FLASHINFER_HOST_DEVICE PlanCutter(Sink& s, int64_t total, int32_t workers, int32_t cut_quantum)
      : sink(s), ranges(total, workers), num_workers(workers), quantum(cut_quantum), range_end(ranges.end_of(0)) {}

  FLASHINFER_HOST_DEVICE void end_worker() {
    sink.end_worker(worker);
    range_end = ranges.end_of(++worker);
  }

  // Places `t` and the same tile of the `heads` - 1 KV heads after it.
  FLASHINFER_HOST_DEVICE void place(PlanTile t, int32_t heads) {
    const int64_t cost = int64_t(t.key_tiles) + 1;
    for (const int32_t end = t.kv_head + heads; t.kv_head < end;) {
      while (range_end <= position) end_worker();
      const int64_t room = range_end - position;
      const int32_t wanted = end - t.kv_head;
      const int32_t run = wanted * cost <= room ? wanted : int32_t(room / cost);
      if (run > 0) {
        sink.whole(t, run);
      } else {
        cut(t, position, position + cost);
      }
      const int32_t placed = run > 0 ? run : 1;
      position += placed * cost;
      t.kv_head += placed;
    }
  }

  FLASHINFER_HOST_DEVICE void cut(const PlanTile& t, int64_t begin, int64_t end) {
    int32_t done = 0;
    int32_t pieces = 0;
    for (; range_end < end; end_worker()) {
      int64_t nearest = range_end - begin - 1;
      if (quantum > 1) nearest = (nearest + quantum / 2) / quantum * quantum;
      if (nearest >= t.key_tiles) break;
      if (nearest <= done) continue;
      sink.piece(t, done, int32_t(nearest));
      done = int32_t(nearest);
      ++pieces;
    }
    if (pieces == 0) {
      sink.whole(t, 1);
    } else {
      sink.piece(t, done, t.key_tiles);
      sink.merge(t, pieces + 1);
    }
  }

  FLASHINFER_HOST_DEVICE void finish() {
    while (worker < num_workers) end_worker();
  }
};

template <typename Sink>
FLASHINFER_HOST_DEVICE void cut(const PlanShape& shape, const PlanLengths& lengths, int64_t total, int32_t quantum,
                                Sink& sink) {
  PlanCutter<Sink> cutter(sink, total, shape.num_workers, quantum);
  for (int32_t request = 0; request < lengths.num_requests; ++request) {
    const int32_t q_len = lengths.q_indptr[request + 1] - lengths.q_indptr[request];
    const int32_t tiles = tiles_of(q_len, shape.group, shape.tile_rows);
    // A request of one tile, as in decode, has the same tile for every head.
    const int32_t heads_at_once = tiles == 1 ? shape.kv_heads : 1;
    for (int32_t kv_head = 0; kv_head < shape.kv_heads; kv_head += heads_at_once) {
      for (int32_t tile = 0; tile < tiles; ++tile) {
        PlanTile t = tile_at(shape, lengths, request, tile);
        t.kv_head = kv_head;
        cutter.place(t, heads_at_once);
      }
    }
  }
  cutter.finish();
}

// The smallest quantum found, by bisection, whose pieces fit `max_pieces`: splits adapt to the buffer that is given.
FLASHINFER_HOST_DEVICE inline int32_t fitting_quantum(const PlanShape& shape, const PlanLengths& lengths, int64_t total,
                                                      int32_t max_pieces) {
  if (max_pieces / 2 >= shape.num_workers - 1) return 1;
  int32_t longest = 1;
  for (int32_t request = 0; request < lengths.num_requests; ++request) {
    const int32_t key_tiles = ceil_div(lengths.kv_len[request], shape.kv_tile);
    if (key_tiles > longest) longest = key_tiles;
  }
  int32_t too_small = 0;
  int32_t fits = longest;  // cuts nothing
  while (fits - too_small > 1) {
    const int32_t middle = too_small + (fits - too_small) / 2;
    PlanCounter counter;
    cut(shape, lengths, total, middle, counter);
    (counter.counts.pieces <= max_pieces ? fits : too_small) = middle;
  }
  return fits;
}

FLASHINFER_HOST_DEVICE inline PlanCounts plan(const PlanShape& shape, const PlanLengths& lengths,
                                              int32_t max_partial_rows, const PlanBuffers& out) {
  const int64_t total = total_cost(shape, lengths);
  const int32_t quantum = fitting_quantum(shape, lengths, total, max_partial_rows / shape.tile_rows);
  PlanWriter writer(shape, out);
  cut(shape, lengths, total, quantum, writer);
  *out.num_merges = writer.counts.merges;
  return writer.counts;
}

}  // namespace flashinfer
