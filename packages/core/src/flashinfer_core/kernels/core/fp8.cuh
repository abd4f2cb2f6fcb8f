// Elements of fp8 as fp16, exactly: by the hardware from sm_89, by arithmetic on bits before it.
#pragma once

#include "core/types.h"

namespace flashinfer {

template <typename Element>
struct Fp8;

// An e5m2 is the upper byte of the fp16.
template <>
struct Fp8<e5m2> {
  // Elements kFirst and kSecond of the four in `x`, as two fp16 in one register.
  template <int kFirst, int kSecond>
  __device__ static uint32_t pair(uint32_t x) {
    return __byte_perm(x, 0, 0x0404 | kFirst << 4 | kSecond << 12);
  }
};

template <>
struct Fp8<e4m3> {
  template <int kFirst, int kSecond>
  __device__ static uint32_t pair(uint32_t x) {
    uint32_t y;
#if __CUDA_ARCH__ >= 890
    const uint32_t low = kSecond == kFirst + 1 ? x >> 8 * kFirst : __byte_perm(x, 0, kFirst | kSecond << 4);
    asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(y) : "r"(low));
#else
    // Exponent and mantissa in their places are the value times 2^-8, also where it is subnormal. The largest magnitude
    // means NaN: one more in its last place carries into the exponent's first bit, and with that set it is one here
    // too.
    const uint32_t upper = __byte_perm(x, 0, 0x0404 | kFirst << 4 | kSecond << 12);
    const uint32_t magnitude = (upper & 0x7f007f00) >> 1;
    const uint32_t no_number = (magnitude + 0x00800080) & 0x40004000;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(y) : "r"((upper & 0x80008000) | magnitude | no_number), "r"(0x5c005c00));
#endif
    return y;
  }
};

}  // namespace flashinfer
