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
