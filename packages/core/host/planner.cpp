#include "planner.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <string>

namespace flashinfer::host {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxHeads = int64_t(1) << 20;  // keeps every product below in 64 bits
constexpr int32_t kMergeCost = 2;                // of writing and merging partial rows, in key tiles
constexpr int32_t kMaxWaves = 8;

[[noreturn]] void invalid(const std::string& text) { throw std::invalid_argument(text); }

void check_positive(const char* name, int64_t value) {
  if (value < 1) invalid(std::string(name) + " must be at least 1, got " + std::to_string(value));
}

void check_within(const char* name, int64_t value, int64_t most) {
  if (value >= 0 && value <= most) return;
  invalid(std::string(name) + " must be in [0, " + std::to_string(most) + "], got " + std::to_string(value));
}

void check_shape(const PlanShape& shape) {
  check_positive("group", shape.group);
  check_positive("kv_heads", shape.kv_heads);
  check_positive("tile_rows", shape.tile_rows);
  check_positive("kv_tile", shape.kv_tile);
  check_positive("num_workers", shape.num_workers);
  if (shape.window_left < -1) invalid("window_left must be at least -1, got " + std::to_string(shape.window_left));
  if (shape.fixed_piece < 0) invalid("fixed_piece must not be negative, got " + std::to_string(shape.fixed_piece));
  if (int64_t(shape.group) * shape.kv_heads > kMaxHeads) {
    invalid("group * kv_heads must be at most " + std::to_string(kMaxHeads) + ", got " +
            std::to_string(int64_t(shape.group) * shape.kv_heads));
  }
  if (2 * int64_t(shape.num_workers) * shape.tile_rows > kInt32Max) {
    invalid("num_workers * tile_rows must be below 2^30, got " +
            std::to_string(int64_t(shape.num_workers) * shape.tile_rows));
  }
}

int32_t checked_pieces(int64_t max_partial_rows, int32_t tile_rows) {
  if (max_partial_rows < 0) invalid("max_partial_rows must not be negative, got " + std::to_string(max_partial_rows));
  return static_cast<int32_t>(std::min(max_partial_rows, kInt32Max) / tile_rows);
}

void check_indptr(const char* name, const int32_t* indptr, int32_t count) {
  if (indptr[0] < 0) invalid(std::string(name) + "[0] must not be negative, got " + std::to_string(indptr[0]));
  for (int32_t i = 0; i < count; ++i) {
    if (indptr[i + 1] >= indptr[i]) continue;
    invalid(std::string(name) + " must not decrease, but " + name + "[" + std::to_string(i + 1) +
            "] = " + std::to_string(indptr[i + 1]) + " follows " + std::to_string(indptr[i]));
  }
}

void check_lengths(const PlanShape& shape, const PlanLengths& lengths) {
  if (lengths.num_requests < 0) {
    invalid("num_requests must not be negative, got " + std::to_string(lengths.num_requests));
  }
  if (lengths.num_requests == 0) return;
  check_indptr("q_indptr", lengths.q_indptr, lengths.num_requests);
  if (lengths.q_indptr[0] != 0) {
    invalid("q_indptr[0] must be 0, got " + std::to_string(lengths.q_indptr[0]) +
            ": the rows of q before it would belong to no request");
  }
  check_indptr("kv_indptr", lengths.kv_indptr, lengths.num_requests);
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    if (lengths.kv_len[i] < 0) {
      invalid("kv_len[" + std::to_string(i) + "] must not be negative, got " + std::to_string(lengths.kv_len[i]));
    }
    // The end of a key tile is counted in 32 bits too.
    if (lengths.kv_len[i] > kInt32Max - shape.kv_tile) {
      invalid("kv_len[" + std::to_string(i) + "] must be at most 2^31 - 1 - kv_tile = " +
              std::to_string(kInt32Max - shape.kv_tile) + ", got " + std::to_string(lengths.kv_len[i]));
    }
    const int64_t rows = (int64_t(lengths.q_indptr[i + 1]) - lengths.q_indptr[i]) * shape.group;
    if (rows > kInt32Max - shape.tile_rows) {
      invalid("request " + std::to_string(i) + " has " + std::to_string(rows) +
              " packed rows (query tokens times group); the limit is 2^31 - 1 - tile_rows");
    }
  }
}

int64_t count_tiles(const PlanShape& shape, const PlanLengths& lengths) {
  int64_t tiles = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    tiles += tiles_of(lengths.q_indptr[i + 1] - lengths.q_indptr[i], shape.group, shape.tile_rows);
  }
  return tiles * shape.kv_heads;
}

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Memory of one call for what the steps of a plan tell each other.
struct Scratch {
  std::unique_ptr<PlanSums[]> before;
  std::unique_ptr<WorkerEnd[]> ends;
  std::unique_ptr<PlanCut[]> cuts;
  PlanScratch place;

  Scratch(int32_t num_requests, int32_t num_workers)
      : before(new PlanSums[num_requests + 1]), ends(new WorkerEnd[num_workers]), cuts(new PlanCut[num_workers]) {
    place = {before.get(), ends.get(), cuts.get()};
  }
};

template <typename T>
T* at(void* base, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

// Key tiles that no tile of the request exceeds, and some tile has, unless a window slides over several.
int32_t most_key_tiles(const PlanShape& shape, int32_t q_len, int32_t kv_len) {
  const int32_t tiles = tiles_of(q_len, shape.group, shape.tile_rows);
  const bool slides = shape.window_left >= 0 && shape.causal && tiles > 1;
  if (!slides) {
    const int32_t longest = shape.causal ? std::max(tiles - 1, 0) : 0;
    return key_tiles(shape, {0, q_len, 0, kv_len, tiles}, longest);
  }
  const int64_t queries = (int64_t(shape.tile_rows) + shape.group - 2) / shape.group + 1;
  const int64_t keys = shape.window_left + queries;  // from the first that the first query sees, through the last
  const int64_t touched = (keys + shape.kv_tile - 2) / shape.kv_tile + 1;
  return static_cast<int32_t>(std::min<int64_t>(touched, ceil_div(kv_len, shape.kv_tile)));
}

// The time of a split into pieces of `length` key tiles, counted in key tiles.
int64_t uniform_cost(int64_t tiles, int32_t key_tiles, int32_t length, int32_t num_workers) {
  const int64_t pieces = ceil_div(key_tiles, length);
  const int64_t waves = (tiles * pieces + num_workers - 1) / num_workers;
  return waves * (length + 1) + (pieces > 1 ? kMergeCost : 0);
}

// Key tiles of a piece. For each number of waves the most pieces that it holds are tried.
int32_t best_piece(int64_t tiles, int32_t key_tiles, int32_t num_workers, int64_t max_pieces) {
  int32_t best = key_tiles;
  int64_t least = uniform_cost(tiles, key_tiles, best, num_workers);
  for (int32_t waves = 1; waves <= kMaxWaves; ++waves) {
    const int64_t pieces = std::min({int64_t(waves) * num_workers / tiles, max_pieces / tiles, int64_t(key_tiles)});
    if (pieces < 2) continue;
    const int32_t length = ceil_div(key_tiles, static_cast<int32_t>(pieces));
    const int64_t cost = uniform_cost(tiles, key_tiles, length, num_workers);
    if (cost >= least) continue;
    best = length;
    least = cost;
  }
  return best;
}

}  // namespace

PlanOffsets plan_offsets(int64_t num_workers, int64_t max_merges) {
  const int64_t indptr_bytes = (num_workers + 1) * int64_t(sizeof(int32_t));
  const int64_t merges = aligned(indptr_bytes + int64_t(sizeof(int32_t)));
  const int64_t arrivals = merges + max_merges * int64_t(sizeof(MergeItem));
  return {indptr_bytes, merges, arrivals, aligned(arrivals + max_merges * int64_t(sizeof(int32_t)))};
}

PlanLimits plan_limits(const PlanShape& shape, int64_t total_q, int64_t num_requests) {
  check_shape(shape);
  const int64_t rows = std::max<int64_t>(total_q, 0) * shape.group;
  const int64_t requests = std::max<int64_t>(std::min(num_requests, total_q), 0);  // those with a query
  const int64_t tiles = (rows / shape.tile_rows + requests) * shape.kv_heads;      // each request ends one
  const int64_t workers = shape.num_workers;
  int64_t items = tiles + workers - 1, merges = workers;
  if (shape.fixed_piece > 0) {
    items = tiles + requests * kMostFixedItems;
    merges = std::max(workers, std::min(tiles, requests * (kMostFixedItems / 2)));
  }
  return {merges, plan_offsets(workers, merges).items + items * int64_t(sizeof(WorkItem))};
}

PlanResult plan(const PlanShape& shape, const PlanLengths& lengths, int64_t max_partial_rows, int64_t max_merges,
                void* out, int64_t out_bytes) {
  check_shape(shape);
  const int32_t max_pieces = checked_pieces(max_partial_rows, shape.tile_rows);
  check_lengths(shape, lengths);
  const int64_t tiles = count_tiles(shape, lengths);
  if (tiles > kInt32Max / 2) invalid("the batch needs " + std::to_string(tiles) + " work items, above 2^30");

  const Scratch scratch(lengths.num_requests, shape.num_workers);
  const PlanSums sums = sum_requests(OneThread{}, shape, lengths, scratch.place);
  const PlanCounts most = most_counts(shape, sums, max_pieces);
  const PlanOffsets offsets = plan_offsets(shape.num_workers, max_merges);
  const int64_t needed = offsets.items + most.items * int64_t(sizeof(WorkItem));
  if (needed > out_bytes || most.merges > max_merges) {
    throw BufferTooSmall("the plan may take " + std::to_string(needed) + " bytes and " + std::to_string(most.merges) +
                         " merges, but its buffer has " + std::to_string(out_bytes) + " and " +
                         std::to_string(max_merges));
  }
  if (most.pieces > max_pieces) {
    throw PartialTooSmall("pieces of fixed length need " + std::to_string(int64_t(most.pieces) * shape.tile_rows) +
                          " partial rows, but their buffer has " + std::to_string(max_partial_rows));
  }
  const PlanBuffers buffers = {at<int32_t>(out, 0),
                               at<int32_t>(out, offsets.num_merges),
                               at<MergeItem>(out, offsets.merges),
                               at<int32_t>(out, offsets.arrivals),
                               at<WorkItem>(out, offsets.items),
                               max_pieces};
  const PlanCounts counts = write_plan(OneThread{}, shape, lengths, sums, scratch.place, buffers);
  return {counts, int64_t(counts.pieces) * shape.tile_rows, offsets.items + counts.items * int64_t(sizeof(WorkItem))};
}

int64_t fixed_rows(const PlanShape& shape, const PlanLengths& lengths) {
  check_shape(shape);
  check_lengths(shape, lengths);
  const Scratch scratch(lengths.num_requests, shape.num_workers);
  return int64_t(sum_requests(OneThread{}, shape, lengths, scratch.place).pieces) * shape.tile_rows;
}

int64_t most_fixed_rows(const PlanShape& shape, int32_t max_q_len, int32_t max_kv_len) {
  check_shape(shape);
  check_within("max_q_len", max_q_len, (kInt32Max - shape.tile_rows) / shape.group);
  check_within("max_kv_len", max_kv_len, kInt32Max - shape.kv_tile);
  const int32_t most_tiles = tiles_of(max_q_len, shape.group, shape.tile_rows);
  const int32_t most_pieces = ceil_div(max_kv_len, shape.kv_tile * std::max(shape.fixed_piece, 1));
  int64_t most = 0;
  for (int32_t tiles = 1; tiles <= most_tiles; ++tiles) {
    const int64_t pieces = std::min<int64_t>(kMostFixedItems / (int64_t(tiles) * shape.kv_heads), most_pieces);
    if (kMostFixedItems / (int64_t(tiles) * shape.kv_heads) < 2) break;
    if (pieces > 1) most = std::max(most, tiles * shape.kv_heads * pieces * shape.tile_rows);
  }
  return most;
}

UniformResult uniform_plan(const PlanShape& shape, int32_t q_len, int32_t kv_len, int64_t max_partial_rows) {
  check_shape(shape);
  const int64_t max_pieces = checked_pieces(max_partial_rows, shape.tile_rows);
  check_within("q_len", q_len, (kInt32Max - shape.tile_rows) / shape.group);
  check_within("kv_len", kv_len, kInt32Max - shape.kv_tile);

  const int32_t tiles_per_head = tiles_of(q_len, shape.group, shape.tile_rows);
  const int64_t tiles = int64_t(tiles_per_head) * shape.kv_heads;
  if (tiles > kInt32Max) invalid("the request needs " + std::to_string(tiles) + " work items, above 2^31 - 1");
  const int32_t key_tiles = std::max(most_key_tiles(shape, q_len, kv_len), 1);
  const int32_t length = tiles == 0 ? key_tiles : best_piece(tiles, key_tiles, shape.num_workers, max_pieces);
  const int32_t pieces = ceil_div(key_tiles, length);
  const UniformWork work = {q_len,        kv_len,           tiles_per_head, pieces, length * shape.kv_tile,
                            shape.causal, shape.window_left};
  return {work, tiles * pieces, pieces > 1 ? tiles * pieces * shape.tile_rows : 0};
}

}  // namespace flashinfer::host
