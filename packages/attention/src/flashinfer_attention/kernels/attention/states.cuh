// Merge attention states of the same rows: o = sum_s exp(lse_s - lse) o_s, lse = log sum_s exp(lse_s).
//
// Nothing but bandwidth counts. A thread has kElements neighbouring columns of a row, 16 bytes of each state, and asks
// for kAhead states before it needs the first; threads lie along a row, then along the next.
#pragma once

#include "attention/states_params.h"
#include "core/math.cuh"

namespace flashinfer {
namespace attention {

constexpr int kStateThreads = 256;

template <bool kFirst, typename A, typename B>
struct Choose {
  using Type = A;
};

template <typename A, typename B>
struct Choose<false, A, B> {
  using Type = B;
};

// Neighbouring columns of a row, in registers as they lie in memory. Two 16-bit elements share a register until they
// are needed: as elements each would take its own, and loads ahead would spill.
template <typename T, int kElements>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Columns {
  static constexpr bool kPairs = sizeof(T) == 2 && kElements > 1;
  using Word = typename Choose<kPairs, uint32_t, T>::Type;
  Word words[kPairs ? kElements / 2 : kElements];

  __device__ float column(int i) const {
    if constexpr (kPairs) {
      const uint32_t pair = words[i / 2];
      return widen(T{static_cast<uint16_t>(i % 2 ? pair >> 16 : pair)});
    } else {
      return widen(words[i]);
    }
  }
};

// Round to T and store.
template <typename T, int kElements>
__device__ void store_columns(T* to, const float (&x)[kElements]) {
  Columns<T, kElements> columns;
  if constexpr (columns.kPairs) {
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) columns.words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  } else if constexpr (sizeof(T) == 2) {
    columns.words[0].bits = static_cast<uint16_t>(pack<T>(x[0], 0.0f));
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) columns.words[i] = x[i];
  }
  *reinterpret_cast<Columns<T, kElements>*>(to) = columns;
}

// The states of one row from `o` and `lse` on, of which this thread has `kElements` columns.
template <typename T, int kElements>
struct RowStates {
  const T* o;
  const float* lse;
  int64_t o_stride;
  int64_t lse_stride;

  __device__ RowStates(const StatesParams& p, const StateRows& rows, int64_t token, int32_t head, int32_t column)
      : o_stride(rows.o_stride_state), lse_stride(rows.lse_stride_state) {
    const int64_t state = p.indptr != nullptr ? p.indptr[token] : 0;
    o = static_cast<const T*>(rows.o) + token * rows.o_stride_token + state * o_stride + head * rows.o_stride_head +
        column;
    lse = rows.lse + token * rows.lse_stride_token + state * lse_stride + head * rows.lse_stride_head;
  }
};

// Some states of a row, on their way from memory. Those that do not exist are units.
template <typename T, int kElements, int kCount>
struct Loaded {
  Columns<T, kElements> o[kCount];
  float lse[kCount];

  __device__ Loaded(const RowStates<T, kElements>& row, int32_t begin, int32_t end) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      o[i] = {};
      lse[i] = negative_infinity();
      if (begin + i < end) {
        o[i] = *reinterpret_cast<const Columns<T, kElements>*>(row.o + (begin + i) * row.o_stride);
        lse[i] = row.lse[(begin + i) * row.lse_stride];
      }
    }
  }
};

// What has been merged: o = columns / sum, lse = max + log(sum).
template <int kElements>
struct StateSum {
  float columns[kElements] = {};
  float max = negative_infinity();
  float sum = 0.0f;

  // A state of weight 0 does not count, whatever its o holds; a NaN in an lse stays one.
  template <typename T, int kCount>
  __device__ void add(const Loaded<T, kElements, kCount>& states, float to_log2) {
    float larger = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) larger = fmaxf(larger, states.lse[i]);
    const float shift = larger == negative_infinity() ? 0.0f : larger;
    const float scale = exp2_approx((max - shift) * to_log2);
    max = larger;
    sum *= scale;
#pragma unroll
    for (int j = 0; j < kElements; ++j) columns[j] *= scale;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = exp2_approx((states.lse[i] - shift) * to_log2);
      sum += weight;
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        columns[j] += weight == 0.0f ? 0.0f : weight * states.o[i].column(j);
      }
    }
  }

  __device__ float lse(float to_log2) const {
    return max == negative_infinity() ? max + sum : max + log2_approx(sum) / to_log2;
  }
};

// One thread's columns of one row: merge them, leave o, return lse.
template <typename TSum, typename T, int kElements, int kAhead>
__device__ float merge_columns(const StatesParams& p, int64_t token, int32_t head, int32_t column) {
  const RowStates<TSum, kElements> first(p, p.first, token, head, column);
  const RowStates<T, kElements> others(p, p.others, token, head, column);
  const int32_t states = p.indptr != nullptr ? p.indptr[token + 1] - p.indptr[token] : p.states;
  StateSum<kElements> total;
  const Loaded<TSum, kElements, 1> one(first, 0, states);
  const Loaded<T, kElements, kAhead> more(others, 0, states - 1);
  total.add(one, p.to_log2);
  total.add(more, p.to_log2);
  for (int32_t s = kAhead; s < states - 1; s += kAhead) {
    total.add(Loaded<T, kElements, kAhead>(others, s, states - 1), p.to_log2);
  }
  const float scale = total.sum == 0.0f ? 0.0f : 1.0f / total.sum;
#pragma unroll
  for (int j = 0; j < kElements; ++j) total.columns[j] *= scale;
  TSum* o = static_cast<TSum*>(p.o) + token * p.o_stride_token + head * p.o_stride_head + column;
  store_columns(o, total.columns);
  return total.lse(p.to_log2);
}

// Grid: any number of CTAs. TSum is the type of the first state and of the result, T that of the other states; their
// addresses and strides are multiples of kElements.
template <typename TSum, typename T, int kElements, int kAhead>
__global__ void __launch_bounds__(kStateThreads, 4) merge_states(const __grid_constant__ StatesParams p) {
  const int32_t vectors = p.head_dim / kElements;
  const int32_t lanes = vectors < kStateThreads ? vectors : kStateThreads;
  const int32_t rows_at_once = kStateThreads / lanes;
  const int32_t lane = threadIdx.x % lanes;
  const int64_t rows = p.tokens * p.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_at_once;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_at_once; begin < rows; begin += step) {
    const int64_t row = begin + threadIdx.x / lanes;
    const int64_t token = row / p.heads;
    const int32_t head = static_cast<int32_t>(row - token * p.heads);
    const bool merges = threadIdx.x / lanes < rows_at_once && row < rows && (p.mask == nullptr || p.mask[token] != 0);
    float lse = 0.0f;
    for (int32_t vector = lane; vector < vectors && merges; vector += lanes) {
      lse = merge_columns<TSum, T, kElements, kAhead>(p, token, head, vector * kElements);
    }
    if (p.in_place) __syncthreads();
    if (merges && lane == 0) p.lse[token * p.lse_stride_token + head * p.lse_stride_head] = lse;
  }
}

}  // namespace attention
}  // namespace flashinfer
