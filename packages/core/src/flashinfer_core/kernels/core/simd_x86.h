// The parts of simd.h that are single instructions on AVX2 with FMA and F16C, and on AVX-512.
#pragma once

#include <immintrin.h>

namespace flashinfer {
namespace simd {

#if defined(__AVX512F__)

inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// b where either is NaN.
inline Floats maximum(Floats a, Floats b) { return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }

inline Words zero_extend(Halves bits) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits); }

inline Floats widen(Halves bits, f16) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }

// Of the unit's 14 bits one step of Newton's makes 23 and more.
inline Floats reciprocal(Floats x) {
  const Floats y = (Floats)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return y * (2 - x * y);
}

// As for other instruction sets, by splitting x into its floor and the rest, in [0, 1) (own minimax fit, exact at 0,
// relative error 8.2e-8). Lanes below 2^-126 are masked, because subnormal numbers would be made by microcode.
inline Floats exp2(Floats x) {
  const __m512 rest = _mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF);
  const Floats r = (Floats)rest;
  Floats power = fma(splat(1.86713028e-3f), r, splat(9.01702978e-3f));
  power = fma(power, r, splat(5.57999127e-2f));
  power = fma(power, r, splat(2.40164444e-1f));
  power = fma(power, r, splat(6.93151295e-1f));
  power = fma(power, r, splat(1.f));
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(normal, (__m512)power, (__m512)x);
}

#else

inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

// b where either is NaN.
inline Floats maximum(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }

inline Words zero_extend(Halves bits) { return (Words)_mm256_cvtepu16_epi32((__m128i)bits); }

inline Floats widen(Halves bits, f16) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }

#endif

inline f16 round_to(float x, f16) { return f16{uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))}; }

}  // namespace simd
}  // namespace flashinfer
