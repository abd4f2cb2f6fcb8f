// Merge attention states of the same rows on CPU threads: o is the mean of the states weighted by exp(lse), lse their
// log-sum-exp. Rows are spread over the workers in equal ranges.
#include <cmath>

#include "attention/states_params.h"
#include "core/simd.h"

namespace flashinfer {
namespace attention {

constexpr int32_t kMaxStateDim = 512;

// Where a row's states lie, and how many there are.
struct StateRow {
  const StatesParams& p;
  int64_t token, head, begin, count;

  StateRow(const StatesParams& params, int64_t row)
      : p(params), token(row / params.heads), head(row % params.heads), begin(0), count(params.states) {
    if (p.indptr == nullptr) return;
    begin = p.indptr[token];
    count = p.indptr[token + 1] - begin;
  }

  const StateRows& rows(int64_t state) const { return state == 0 ? p.first : p.others; }

  // States are counted from the first one of `rows(state)`.
  int64_t index(int64_t state) const { return begin + (state == 0 ? 0 : state - 1); }

  float lse(int64_t state) const {
    const StateRows& from = rows(state);
    return from.lse[token * from.lse_stride_token + index(state) * from.lse_stride_state + head * from.lse_stride_head];
  }

  template <class T>
  const T* o(int64_t state) const {
    const StateRows& from = rows(state);
    return static_cast<const T*>(from.o) + token * from.o_stride_token + index(state) * from.o_stride_state +
           head * from.o_stride_head;
  }
};

template <class T>
void add_weighted(float* sum, const T* o, float weight, int32_t count) {
  int32_t i = 0;
  for (; i + simd::kLanes <= count; i += simd::kLanes) {
    simd::store(sum + i, simd::fma(simd::splat(weight), simd::load(o + i), simd::load(sum + i)));
  }
  if (i == count) return;
  const simd::Floats part = simd::fma(simd::splat(weight), simd::load<simd::kPart>(o + i), simd::load(sum + i));
  simd::store<simd::kPart>(sum + i, part);
}

// A state of weight 0 does not count, whatever its o holds; a NaN in an lse stays one.
template <class TSum, class T>
void merge_row(const StatesParams& p, const StateRow& row) {
  const float natural = p.to_log2 * 0.693147181f;  // times an lse is a natural one
  float largest = -__builtin_inff();
  for (int64_t state = 0; state < row.count; ++state) largest = std::fmax(largest, row.lse(state));
  const float shift = largest == -__builtin_inff() ? 0 : largest;
  alignas(64) float o[kMaxStateDim + simd::kLanes] = {};
  float sum = 0;
  for (int64_t state = 0; state < row.count; ++state) {
    const float weight = std::exp((row.lse(state) - shift) * natural);
    sum += weight;
    if (weight == 0) continue;
    if (state == 0) {
      add_weighted(o, row.o<TSum>(state), weight, p.head_dim);
    } else {
      add_weighted(o, row.o<T>(state), weight, p.head_dim);
    }
  }
  const float scale = sum == 0 ? 0 : 1 / sum;
  TSum* to = static_cast<TSum*>(p.o) + row.token * p.o_stride_token + row.head * p.o_stride_head;
  for (int32_t d = 0; d < p.head_dim; ++d) to[d] = simd::round_to(o[d] * scale, TSum{});
  p.lse[row.token * p.lse_stride_token + row.head * p.lse_stride_head] = largest + std::log(sum) / natural;
}

template <class TSum, class T>
void merge_states(const StatesParams& p, int32_t worker, int32_t num_workers) {
  const int64_t rows = p.tokens * p.heads;
  const int64_t end = rows * (worker + 1) / num_workers;
  for (int64_t i = rows * worker / num_workers; i < end; ++i) {
    const StateRow row(p, i);
    if (p.mask == nullptr || p.mask[row.token] != 0) merge_row<TSum, T>(p, row);
  }
}

}  // namespace attention
}  // namespace flashinfer
