// The two products of decode, for a block of query rows that share a KV head: scores of some keys, and their values
// added to the output.
//
// Rows of K and V are widened once for the whole block, sums stay in registers, and each line of memory that is used is
// followed by the request for one that is used later: requests in bursts would not overlap with the arithmetic.
#pragma once

#include "core/simd.h"

namespace flashinfer {
namespace attention {

// Sums that are held in registers at a time.
constexpr int32_t kSums = simd::kRegisters == 32 ? 16 : 8;
constexpr int32_t kPair = 2 * simd::kLanes;

// Elements of a line of the caches, and of what is fetched at a time: a line, or a pair where that is more.
template <class T>
constexpr int32_t kLine = 64 / int32_t(sizeof(T));
template <class T>
constexpr int32_t kFetched = kLine<T> > kPair ? kLine<T> : kPair;

// Rows of K or V in memory, and for each of them one that is read later and fetched now.
template <class T, int32_t kMax>
struct Rows {
  const T* now[kMax];
  const T* ahead[kMax];
};

// Into the L2 only: the L1 does not hold all that lies between.
template <class T>
inline void fetch(const T* from) {
  for (int32_t i = 0; i < kFetched<T>; i += kLine<T>) __builtin_prefetch(from + i, 0, 2);
}

// Keys that are multiplied at a time with a block of `width` rows.
constexpr int32_t keys_at_once(int32_t width) { return kSums / width; }

// Of rows and keys the fewer stay in registers.
template <int32_t kWidth, class T>
inline void add_pairs(const float* q, int32_t stride, const T* const* keys, int32_t d, simd::Floats* dot) {
  constexpr int32_t kKeys = keys_at_once(kWidth);
  simd::Pair held[kWidth > kKeys ? kKeys : kWidth];
  if constexpr (kWidth > kKeys) {
    for (int32_t i = 0; i < kKeys; ++i) held[i] = simd::held(simd::load_pair(keys[i] + d));
    for (int32_t r = 0; r < kWidth; ++r) {
      const simd::Pair x = simd::held(simd::load_pair(q + r * stride + d));
      for (int32_t i = 0; i < kKeys; ++i) dot[i * kWidth + r] = simd::fma(held[i], x, dot[i * kWidth + r]);
    }
  } else {
    for (int32_t r = 0; r < kWidth; ++r) held[r] = simd::held(simd::load_pair(q + r * stride + d));
    for (int32_t i = 0; i < kKeys; ++i) {
      const simd::Pair x = simd::load_pair(keys[i] + d);
      for (int32_t r = 0; r < kWidth; ++r) dot[i * kWidth + r] = simd::fma(held[r], x, dot[i * kWidth + r]);
    }
  }
}

template <int32_t kWidth, class T>
inline void add_part(const float* q, int32_t stride, const T* const* keys, int32_t d, simd::Floats* dot) {
  constexpr int32_t kKeys = keys_at_once(kWidth);
  for (int32_t i = 0; i < kKeys; ++i) {
    const simd::Floats x = simd::load<simd::kPart>(keys[i] + d);
    for (int32_t r = 0; r < kWidth; ++r) {
      dot[i * kWidth + r] = simd::fma(x, simd::load<simd::kPart>(q + r * stride + d), dot[i * kWidth + r]);
    }
  }
}

// s[key * kWidth + row] for keys_at_once(kWidth) keys, while as many others are fetched. q: rows in the order of
// load_pair, `stride` apart.
template <int32_t kWidth, class T>
inline void multiply_keys(const float* q, int32_t stride, const T* const* keys, const T* const* ahead, int32_t head_dim,
                          float* s) {
  simd::Floats dot[kSums] = {};
  int32_t d = 0;
  for (; d + kFetched<T> <= head_dim; d += kFetched<T>) {
    for (int32_t i = 0; i < keys_at_once(kWidth); ++i) fetch(ahead[i] + d);
    for (int32_t e = d; e < d + kFetched<T>; e += kPair) add_pairs<kWidth>(q, stride, keys, e, dot);
  }
  for (; d + kPair <= head_dim; d += kPair) add_pairs<kWidth>(q, stride, keys, d, dot);
  for (; d < head_dim; d += simd::kPart) add_part<kWidth>(q, stride, keys, d, dot);
  for (int32_t i = 0; i < kSums; i += simd::kLanes) simd::store(s + i, simd::sums(dot + i));
}

// kPairs pairs of columns from `d` on.
template <int32_t kWidth, int32_t kPairs, class T, int32_t kMax>
inline void add_columns(float* o, int32_t stride, const float* p, const Rows<T, kMax>& values, int32_t keys,
                        int32_t d) {
  simd::Pair sum[kPairs][kWidth];
  for (int32_t j = 0; j < kPairs; ++j) {
    for (int32_t r = 0; r < kWidth; ++r) sum[j][r] = simd::load_pair(o + r * stride + d + j * kPair);
  }
  for (int32_t i = 0; i < keys; ++i) {
    simd::Floats weight[kWidth];
    for (int32_t r = 0; r < kWidth; ++r) weight[r] = simd::splat(p[i * kWidth + r]);
    for (int32_t j = 0; j < kPairs; ++j) {
      if (j * kPair % kFetched<T> == 0) fetch(values.ahead[i] + d + j * kPair);
      const simd::Pair x = simd::held(simd::load_pair(values.now[i] + d + j * kPair));
      for (int32_t r = 0; r < kWidth; ++r) {
        sum[j][r] = {simd::fma(weight[r], x.first, sum[j][r].first), simd::fma(weight[r], x.second, sum[j][r].second)};
      }
    }
  }
  for (int32_t j = 0; j < kPairs; ++j) {
    for (int32_t r = 0; r < kWidth; ++r) simd::store_pair(o + r * stride + d + j * kPair, sum[j][r]);
  }
}

template <int32_t kWidth, class T>
inline void add_last_columns(float* o, int32_t stride, const float* p, const T* const* values, int32_t keys,
                             int32_t d) {
  for (int32_t r = 0; r < kWidth; ++r) {
    simd::Floats sum = simd::load<simd::kPart>(o + r * stride + d);
    for (int32_t i = 0; i < keys; ++i) {
      sum = simd::fma(simd::splat(p[i * kWidth + r]), simd::load<simd::kPart>(values[i] + d), sum);
    }
    simd::store<simd::kPart>(o + r * stride + d, sum);
  }
}

// o[row] += p[key * kWidth + row] * values[key]. o: rows in the order of load_pair, `stride` apart.
template <int32_t kWidth, class T, int32_t kMax>
inline void add_values(float* o, int32_t stride, const float* p, const Rows<T, kMax>& values, int32_t keys,
                       int32_t head_dim) {
  constexpr int32_t kPairs = kSums / (2 * kWidth) < 4 ? kSums / (2 * kWidth) : 4;
  int32_t d = 0;
  for (; d + kPairs * kPair <= head_dim; d += kPairs * kPair) {
    add_columns<kWidth, kPairs>(o, stride, p, values, keys, d);
  }
  for (; d + kPair <= head_dim; d += kPair) add_columns<kWidth, 1>(o, stride, p, values, keys, d);
  for (; d < head_dim; d += simd::kPart) add_last_columns<kWidth>(o, stride, p, values.now, keys, d);
}

}  // namespace attention
}  // namespace flashinfer
