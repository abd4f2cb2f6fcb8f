// Merge the partial results of tiles that were cut: o is the mean of the pieces weighted by exp(lse), lse their
// log-sum-exp, of the sink too. One row at a time; rows are spread over the workers.
#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

inline float largest_lse(const MergeParams& p, int64_t partial, int32_t pieces) {
  float largest = -kInfinity;
  for (int32_t piece = 0; piece < pieces; ++piece) {
    largest = std::fmax(largest, p.partial_lse[partial + int64_t(piece) * p.tile_rows]);
  }
  return largest;
}

// Row `row` of the tile; a piece that saw nothing has weight 0 and its o is not read.
template <class T>
void merge_row(const MergeParams& p, const MergeItem& item, int32_t row) {
  const int64_t partial = int64_t(item.partial) + row;
  const int32_t packed = item.row_begin + row;
  const int64_t head = int64_t(item.kv_head) * p.group + packed % p.group;
  const float sink = p.sinks == nullptr ? -kInfinity : p.sinks[head];
  const float largest = std::fmax(largest_lse(p, partial, item.pieces), sink);
  float sum = sink == -kInfinity ? 0 : std::exp(sink - largest);
  alignas(64) float o[kMaxHeadDim] = {};
  for (int32_t piece = 0; piece < item.pieces && largest != -kInfinity; ++piece) {
    const int64_t slot = partial + int64_t(piece) * p.tile_rows;
    const float weight = std::exp(p.partial_lse[slot] - largest);
    if (weight == 0) continue;
    const float* from = p.partial_o + slot * p.head_dim_vo;
    for (int32_t d = 0; d < p.head_dim_vo; ++d) o[d] += weight * from[d];
    sum += weight;
  }
  const float scale = sum == 0 ? 0 : 1 / sum;
  const int64_t token = int64_t(item.q_start) + packed / p.group;
  T* to = static_cast<T*>(p.o) + token * p.o_stride_token + head * p.o_stride_head;
  for (int32_t d = 0; d < p.head_dim_vo; ++d) to[d] = simd::round_to(o[d] * scale, T{});
  if (p.lse == nullptr) return;
  const float lse = sum == 0 ? -kInfinity : largest + std::log(sum);
  p.lse[token * p.kv_heads * p.group + head] = lse * p.lse_scale;
}

template <class T>
void merge(const MergeParams& p, int32_t worker, int32_t num_workers) {
  const bool listed = p.merges != nullptr;
  const int32_t merges = listed ? *p.num_merges : p.kv_heads * p.uniform.tiles;
  for (int32_t i = 0; i < merges; ++i) {
    const MergeItem item = listed ? p.merges[i] : uniform_merge(p.uniform, p.group, p.tile_rows, i);
    for (int32_t row = worker; row < item.rows; row += num_workers) merge_row<T>(p, item, row);
  }
}

}  // namespace attention
}  // namespace flashinfer
