// The parts of simd.h for x86-64-v2 and for Arm: four lanes, with half precision by integer arithmetic on x86.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace flashinfer {
namespace simd {

// b where either is NaN.
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline Words zero_extend(Halves bits) { return __builtin_convertvector(bits, Words); }

#if defined(__aarch64__)

inline Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

inline Floats widen(Halves bits, f16) { return (Floats)vcvt_f32_f16((float16x4_t)bits); }

inline f16 round_to(float x, f16) {
  const __fp16 rounded = x;
  f16 result;
  __builtin_memcpy(&result, &rounded, sizeof(result));
  return result;
}

#else

inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }

// The product with 2^112 corrects the exponent, of subnormal numbers too; infinity and NaN get the largest one.
inline Floats widen(Halves bits, f16) {
  const Words wide = zero_extend(bits);
  const Words magnitude = (wide & 0x7fff) << 13;
  const Words special = (Words)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
  return (Floats)((Words)((Floats)magnitude * 0x1p112f) | special | (wide & 0x8000) << 16);
}

// Round to nearest even. Adding `unit`, the exponent's 2^13 units in the last place, drops the bits that do not fit.
inline f16 round_to(float x, f16) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return f16{uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};
  if (bits < 0x38800000) {  // subnormal: the sum with 0.5 has its last place at 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, sizeof(bits));
    return f16{uint16_t(sign | (bits & 0x7ff))};
  }
  return f16{uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13))};
}

#endif

}  // namespace simd
}  // namespace flashinfer
