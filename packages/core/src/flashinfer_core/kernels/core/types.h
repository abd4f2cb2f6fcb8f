// Integer and element types for device and CPU kernels alike.
//
// NVRTC finds no system header, so the fixed-width names are declared here when it compiles.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define FLASHINFER_HOST_DEVICE __host__ __device__
#else
#include <cstdint>
#define FLASHINFER_HOST_DEVICE
#endif

namespace flashinfer {

using f32 = float;

// IEEE binary16, held as bits.
struct alignas(2) f16 {
  uint16_t bits;
};

// bfloat16, held as bits.
struct alignas(2) bf16 {
  uint16_t bits;
};

// fp8 with 4 bits of exponent and 3 of mantissa: no infinity, NaN where all bits but the sign are set. Held as bits.
struct e4m3 {
  uint8_t bits;
};

// fp8 with 5 bits of exponent and 2 of mantissa: the upper half of a binary16. Held as bits.
struct e5m2 {
  uint8_t bits;
};

static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2, "half-precision elements are two bytes");

}  // namespace flashinfer
