// Merge attention states of the same rows: o = sum_s exp(lse_s - lse) o_s, lse = log sum_s exp(lse_s).
//
// Bandwidth counts, so each thread has few instructions a byte: two vectors of a row, up to 16 bytes each, of every
// state, and the loads of 1 + kAhead states under way before it needs the first. Threads lie along a row, then along
// the next.
#pragma once

#include "attention/states_params.h"
#include "core/copy.cuh"
#include "core/math.cuh"

namespace flashinfer {
namespace attention {

constexpr int kStateThreads = 256;

// Vectors of a row that a thread has, so that as much is under way for two states as for many.
__device__ constexpr int vectors_of(int ahead) { return ahead < 7 ? 2 : 1; }

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

// Read columns that nobody reads again.
template <typename T, int kElements>
__device__ Columns<T, kElements> load_columns(const T* from) {
  Columns<T, kElements> columns;
  if constexpr (sizeof(columns) % 16 == 0) {
    auto* vectors = reinterpret_cast<Vector16*>(&columns);
    for (int i = 0; i < static_cast<int>(sizeof(columns) / 16); ++i) {
      vectors[i] = load_once(reinterpret_cast<const Vector16*>(from) + i);
    }
  } else {
    columns = *reinterpret_cast<const Columns<T, kElements>*>(from);
  }
  return columns;
}

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

// Which vectors of a row a thread has: `column` and, where it exists, `apart` columns after it.
struct Share {
  int32_t column;
  int32_t apart;
  bool has_second;

  __device__ bool has(int vector) const { return vector == 0 || has_second; }
};

// Some states of a row, on their way from memory. Those that do not exist are units.
template <typename T, int kElements, int kVectors, int kCount>
struct Loaded {
  Columns<T, kElements> o[kCount][kVectors];
  float lse[kCount];

  // States `begin` to `end` - 1 of those that begin at `from` and `from_lse`.
  __device__ Loaded(const StateRows& rows, const T* from, const float* from_lse, const Share& share, int32_t begin,
                    int32_t end) {
    from += begin * rows.o_stride_state;
    from_lse += begin * rows.lse_stride_state;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      lse[i] = negative_infinity();
      if (begin + i < end) {
        lse[i] = *from_lse;
#pragma unroll
        for (int vector = 0; vector < kVectors; ++vector) {
          if (share.has(vector)) o[i][vector] = load_columns<T, kElements>(from + vector * share.apart);
        }
      }
      from += rows.o_stride_state;
      from_lse += rows.lse_stride_state;
    }
  }
};

// What has been merged: o = columns / sum, lse = max + log(sum).
template <int kElements, int kVectors>
struct StateSum {
  float columns[kVectors][kElements] = {};
  float max = negative_infinity();
  float sum = 0.0f;
  float to_log2;

  __device__ explicit StateSum(float scale) : to_log2(scale) {}

  // What logarithms are taken from: a difference of two infinities would be NaN.
  __device__ float base() const { return max == negative_infinity() ? 0.0f : max; }

  __device__ void scale(float factor) {
    sum *= factor;
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) columns[vector][j] *= factor;
    }
  }

  template <typename T, int kCount>
  __device__ void raise(const Loaded<T, kElements, kVectors, kCount>& states) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) max = fmaxf(max, states.lse[i]);
  }

  // Add states that `max` counts already. A state of weight 0 does not count, whatever its o holds; a NaN stays one.
  template <typename T, int kCount>
  __device__ void add(const Loaded<T, kElements, kVectors, kCount>& states) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = exp2_approx((states.lse[i] - base()) * to_log2);
      if (weight == 0.0f) continue;
      sum += weight;
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) columns[vector][j] += weight * states.o[i][vector].column(j);
      }
    }
  }

  __device__ float lse() const { return max == negative_infinity() ? max + sum : max + log2_approx(sum) / to_log2; }
};

// One thread's share of one row: merge, leave o, return lse.
template <typename TSum, typename T, int kElements, int kAhead>
__device__ float merge_share(const StatesParams& p, int64_t token, int32_t head, const Share& share) {
  constexpr int kVectors = vectors_of(kAhead);
  const int64_t start = p.indptr != nullptr ? p.indptr[token] : 0;
  const int32_t states = p.indptr != nullptr ? static_cast<int32_t>(p.indptr[token + 1] - start) : p.states;
  const auto* first = static_cast<const TSum*>(p.first.o) + token * p.first.o_stride_token +
                      start * p.first.o_stride_state + head * p.first.o_stride_head + share.column;
  const float* first_lse = p.first.lse + token * p.first.lse_stride_token + start * p.first.lse_stride_state +
                           head * p.first.lse_stride_head;
  const auto* others = static_cast<const T*>(p.others.o) + token * p.others.o_stride_token +
                       start * p.others.o_stride_state + head * p.others.o_stride_head + share.column;
  const float* others_lse = p.others.lse + token * p.others.lse_stride_token + start * p.others.lse_stride_state +
                            head * p.others.lse_stride_head;
  const Loaded<TSum, kElements, kVectors, 1> one(p.first, first, first_lse, share, 0, states);
  const Loaded<T, kElements, kVectors, kAhead> more(p.others, others, others_lse, share, 0, states - 1);
  StateSum<kElements, kVectors> total(p.to_log2);
  total.raise(one);
  total.raise(more);
  total.add(one);
  total.add(more);
  for (int32_t s = kAhead; s < states - 1; s += kAhead) {
    const Loaded<T, kElements, kVectors, kAhead> next(p.others, others, others_lse, share, s, states - 1);
    const float before = total.max;
    total.raise(next);
    total.scale(exp2_approx((before - total.base()) * p.to_log2));
    total.add(next);
  }
  const float lse = total.lse();
  total.scale(total.sum == 0.0f ? 0.0f : 1.0f / total.sum);
  TSum* o = static_cast<TSum*>(p.o) + token * p.o_stride_token + head * p.o_stride_head + share.column;
#pragma unroll
  for (int vector = 0; vector < kVectors; ++vector) {
    if (share.has(vector)) store_columns(o + vector * share.apart, total.columns[vector]);
  }
  return lse;
}

// Grid: any number of CTAs. TSum is the type of the first state and of the result, T that of the other states; their
// addresses and strides are multiples of kElements. A row has at most kStateThreads * vectors_of(kAhead) vectors.
template <typename TSum, typename T, int kElements, int kAhead>
__global__ void __launch_bounds__(kStateThreads) merge_states(const __grid_constant__ StatesParams p) {
  constexpr int kVectors = vectors_of(kAhead);
  const int32_t vectors = p.head_dim / kElements;
  const int32_t lanes = (vectors + kVectors - 1) / kVectors;
  const int32_t rows_at_once = kStateThreads / lanes;
  const int32_t lane = threadIdx.x % lanes;
  const Share share = {lane * kElements, lanes * kElements, lane + lanes < vectors};
  const int64_t rows = p.tokens * p.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_at_once;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_at_once; begin < rows; begin += step) {
    const int64_t row = begin + threadIdx.x / lanes;
    // Dividing 64 bits takes as long as the rest of the row.
    const int64_t token = row >> 31 == 0 ? static_cast<uint32_t>(row) / static_cast<uint32_t>(p.heads) : row / p.heads;
    const int32_t head = static_cast<int32_t>(row - token * p.heads);
    const bool merges = threadIdx.x / lanes < rows_at_once && row < rows && (p.mask == nullptr || p.mask[token] != 0);
    float lse = 0.0f;
    if (merges) lse = merge_share<TSum, T, kElements, kAhead>(p, token, head, share);
    if (p.in_place) __syncthreads();
    if (merges && lane == 0) p.lse[token * p.lse_stride_token + head * p.lse_stride_head] = lse;
  }
}

}  // namespace attention
}  // namespace flashinfer
