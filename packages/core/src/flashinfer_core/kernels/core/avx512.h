// What packs operands for AMX: transpositions in AVX-512 registers, and pairs of fp32 rounded to bf16.
//
// A vector is put together from four pieces of 16 bytes and each is transposed for itself; as the pieces are chosen,
// that leaves the result in the order of memory, and no shuffle has to cross them.
#pragma once

#include <immintrin.h>

#include "core/simd.h"

namespace flashinfer {
namespace simd {

using Bytes = __m512i;

inline Bytes join(const void* a, const void* b, const void* c, const void* d) {
  Bytes x = _mm512_castsi128_si512(_mm_loadu_si128(static_cast<const __m128i*>(a)));
  x = _mm512_inserti32x4(x, _mm_loadu_si128(static_cast<const __m128i*>(b)), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128(static_cast<const __m128i*>(c)), 2);
  return _mm512_inserti32x4(x, _mm_loadu_si128(static_cast<const __m128i*>(d)), 3);
}

inline void store_bytes(void* to, Bytes x) { _mm512_storeu_si512(to, x); }

inline Bytes interleave_low(Bytes a, Bytes b, uint16_t) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes interleave_high(Bytes a, Bytes b, uint16_t) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes interleave_low(Bytes a, Bytes b, uint32_t) { return _mm512_unpacklo_epi32(a, b); }
inline Bytes interleave_high(Bytes a, Bytes b, uint32_t) { return _mm512_unpackhi_epi32(a, b); }

// Element i of a part of x[j] becomes element j of the same part of x[i]. To interleave halves log2 times transposes.
template <class Element>
inline void transpose_parts(Bytes (&x)[16 / sizeof(Element)]) {
  constexpr int kSize = 16 / sizeof(Element);
  for (int stage = 1; stage < kSize; stage *= 2) {
    Bytes y[kSize];
    for (int i = 0; i < kSize / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kSize / 2], Element{});
      y[2 * i + 1] = interleave_high(x[i], x[i + kSize / 2], Element{});
    }
    for (int i = 0; i < kSize; ++i) x[i] = y[i];
  }
}

// Both rounded to the nearest bf16, ties away from zero, side by side in each 32-bit lane. For finite numbers.
inline Bytes pair_bf16(Floats low, Floats high) {
  const Words first = ((Words)low + 0x8000) >> 16;
  return (Bytes)(first | (((Words)high + 0x8000) & 0xffff0000u));
}

// A row of `count` elements, a multiple of 32, rounded to nearest even.
inline void round_row(bf16* to, const float* from, int32_t count) {
  for (int32_t i = 0; i < count; i += 32) {
    store_bytes(to + i, (Bytes)_mm512_cvtne2ps_pbh((__m512)load(from + i + 16), (__m512)load(from + i)));
  }
}

inline bool all_equal(Floats a, float b) { return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_NEQ_UQ) == 0; }

}  // namespace simd
}  // namespace flashinfer
