// Rows of q, k, v and o in memory, for the CPU kernels: where the keys of a tile lie, and what a finished row becomes.
#pragma once

#include <cmath>

#include "attention/params.h"
#include "core/simd.h"
#include "core/uniform.h"

namespace flashinfer {
namespace attention {

constexpr int32_t kMaxHeadDim = 512;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

inline int32_t round_up(int32_t x, int32_t multiple) { return ceil_div(x, multiple) * multiple; }

constexpr int32_t larger(int32_t a, int32_t b) { return a < b ? b : a; }

inline int32_t clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : x < high ? x : high; }

// Offsets, in elements, of KV head 0 of `count` consecutive keys of a request.
template <int32_t kMaxKeys>
struct KeyRows {
  int64_t k[kMaxKeys];
  int64_t v[kMaxKeys];
  int32_t count;

  void locate(const AttentionParams& p, int32_t kv_start, int32_t begin, int32_t end) {
    count = end - begin;
    if (p.page_table == nullptr) {
      for (int32_t i = 0; i < count; ++i) {
        const int64_t row = int64_t(kv_start) + begin + i;
        k[i] = row * p.k_stride_token;
        v[i] = row * p.v_stride_token;
      }
      return;
    }
    int32_t entry = kv_start + begin / p.page_size;
    int32_t slot = begin % p.page_size;
    for (int32_t i = 0; i < count; ++entry, slot = 0) {
      const int64_t page = p.page_table[entry];
      for (; slot < p.page_size && i < count; ++slot, ++i) {
        k[i] = page * p.k_stride_page + slot * p.k_stride_token;
        v[i] = page * p.v_stride_page + slot * p.v_stride_token;
      }
    }
  }
};

// Query token and head of a packed row, for tiles whose rows are `group` heads of each query.
struct QueryRow {
  int64_t token;
  int32_t query;
  int32_t head;

  QueryRow(const WorkItem& item, int32_t row, int32_t group)
      : query(row / group), head(item.kv_head * group + row % group) {
    token = int64_t(item.q_start) + query;
  }
};

// Keys of the request that a query sees.
inline int32_t keys_seen(const AttentionParams& p, const WorkItem& item, int32_t query) {
  return p.causal ? item.kv_len - item.q_len + query + 1 : item.kv_len;
}

inline float value_or_one(const float* values, int32_t index) { return values == nullptr ? 1 : values[index]; }

// What turns q k^T into a score in base 2.
inline float score_scale(const AttentionParams& p, int32_t kv_head) {
  const float scale = value_or_one(p.q_scale, 0) * value_or_one(p.k_scale, kv_head * p.k_scale_stride);
  return p.sm_scale * kLog2E * scale;
}

// What turns a mean of v into the result.
inline float value_scale(const AttentionParams& p, int32_t kv_head) {
  return p.v_factor * value_or_one(p.v_scale, kv_head * p.v_scale_stride);
}

// The sum of a row's weights, relative to 2^maximum. A row that has nothing to sum has lse = -inf and weight 0.
struct RowSum {
  float maximum;  // in base 2
  float sum;

  // A sink takes part in the sum and has no value: what was summed before weighs less.
  float add_sink(float sink) {
    const float logit = sink * kLog2E;
    const float highest = std::fmax(maximum, logit);
    if (highest == -kInfinity) return 1;
    const float rescale = std::exp2(maximum - highest);
    *this = {highest, sum * rescale + std::exp2(logit - highest)};
    return rescale;
  }

  float weight() const { return sum == 0 ? 0 : 1 / sum; }
  float lse() const { return sum == 0 ? -kInfinity : (maximum + std::log2(sum)) * kLn2; }
};

// Divide a finished row by its sum and write it with its lse: to the result, or to the piece's rows of the partial
// buffers.
template <class T>
void write_row(const AttentionParams& p, const WorkItem& item, int32_t tile_row, const QueryRow& row, const float* o,
               float maximum, float sum) {
  const float scale = value_scale(p, row.head / p.group);
  RowSum total = {maximum, sum};
  if (item.partial >= 0) {
    const int64_t slot = int64_t(item.partial) + tile_row;
    float* to = p.partial_o + slot * p.head_dim_vo;
    const float weight = scale * total.weight();
    for (int32_t d = 0; d < p.head_dim_vo; ++d) to[d] = o[d] * weight;
    p.partial_lse[slot] = total.lse();
    return;
  }
  const float rescale = p.sinks == nullptr ? 1 : total.add_sink(p.sinks[row.head]);
  const float weight = scale * rescale * total.weight();
  T* to = static_cast<T*>(p.o) + row.token * p.o_stride_token + row.head * p.o_stride_head;
  for (int32_t d = 0; d < p.head_dim_vo; ++d) to[d] = simd::round_to(o[d] * weight, T{});
  if (p.lse != nullptr) p.lse[row.token * p.kv_heads * p.group + row.head] = total.lse() * p.lse_scale;
}

// The items of one worker, listed by a plan or computed from `uniform`.
class WorkerItems {
 public:
  // `group` and `kv_heads` are those of the plan.
  WorkerItems(const AttentionParams& p, int32_t group, int32_t kv_heads, int32_t tile_rows, int32_t kv_tile,
              int32_t worker, int32_t num_workers)
      : p_(p), group_(group), kv_heads_(kv_heads), tile_rows_(tile_rows), kv_tile_(kv_tile) {
    const bool listed = p.items != nullptr;
    next_ = listed ? p.worker_indptr[worker] : worker;
    end_ = listed ? p.worker_indptr[worker + 1] : kv_heads * p.uniform.tiles * p.uniform.pieces;
    step_ = listed ? 1 : num_workers;
  }

  bool next(WorkItem& item) {
    if (next_ >= end_) return false;
    item = p_.items != nullptr ? p_.items[next_]
                               : uniform_item(p_.uniform, group_, kv_heads_, tile_rows_, kv_tile_, next_);
    next_ += step_;
    return true;
  }

 private:
  const AttentionParams& p_;
  int32_t group_, kv_heads_, tile_rows_, kv_tile_;
  int32_t next_, end_, step_;
};

}  // namespace attention
}  // namespace flashinfer
