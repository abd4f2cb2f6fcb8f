// CPU vectors of fp32: one width per instruction set, chosen by the compiler's -march.
//
// GCC's vector types give arithmetic, comparison and selection; the three headers included below add what differs:
// fused multiply-add, maximum and half-precision conversion. 16-bit elements are read as they are and widened.
#pragma once

#include <cstdint>
#include <utility>

#include "core/types.h"

namespace flashinfer {
namespace simd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Elements of the last vector of a row: rows are multiples of 8 long.
constexpr int kPart = kLanes < 8 ? kLanes : 8;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

using Lanes = std::make_integer_sequence<int, kLanes>;

// Subtracting zero is exact, so nothing but the broadcast is left of it; adding zero would change -0.
inline Floats splat(float x) { return x - Floats{}; }

// x, loaded once: without this GCC reads memory again at every use, which costs more than a register.
inline Floats held(Floats x) {
#if defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+v"(x));
#endif
  return x;
}

// Lane numbers 0, 1, 2, ...
inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Lane j is lane i[j] of `a` and `b` laid end to end.
template <int... i>
inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, Ints{i...});
#endif
}

// `count` elements from memory of any alignment; other lanes are zero.
template <int count = kLanes>
inline Floats load(const float* from) {
  Floats x{};
  __builtin_memcpy(&x, from, count * sizeof(float));
  return x;
}

template <int count, class T>
inline Halves load_bits(const T* from) {
  Halves bits{};
  __builtin_memcpy(&bits, from, count * sizeof(T));
  return bits;
}

template <int count = kLanes>
inline void store(float* to, Floats x) {
  __builtin_memcpy(to, &x, count * sizeof(float));
}

}  // namespace simd
}  // namespace flashinfer

#if defined(__AVX2__) || defined(__AVX512F__)
#include "core/simd_x86.h"
#else
#include "core/simd_generic.h"
#endif

namespace flashinfer {
namespace simd {

// bfloat16 is the upper half of fp32.
inline Floats widen(Halves bits, bf16) { return (Floats)(zero_extend(bits) << 16); }

template <int count = kLanes>
inline Floats load(const bf16* from) {
  return widen(load_bits<count>(from), bf16{});
}

template <int count = kLanes>
inline Floats load(const f16* from) {
  return widen(load_bits<count>(from), f16{});
}

template <int count>
inline Halves load_bytes(const void* from) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes{};
  __builtin_memcpy(&bytes, from, count);
  return __builtin_convertvector(bytes, Halves);
}

// The upper half of a binary16.
template <int count = kLanes>
inline Floats load(const e5m2* from) {
  return widen(load_bytes<count>(from) << 8, f16{});
}

// A binary16 whose exponent is 8 too small. The largest number would be 480; it stands for NaN.
template <int count = kLanes>
inline Floats load(const e4m3* from) {
  const Halves bits = load_bytes<count>(from);
  const Floats x = widen((bits & 0x7f) << 7 | (bits & 0x80) << 8, f16{}) * 256.f;
  return (Words)x << 1 == 0x43f00000u << 1 ? splat(__builtin_nanf("")) : x;
}

// A row of `count` elements, a multiple of 8, as fp32; zeros may follow it up to a whole vector.
template <class T>
inline void widen_row(float* to, const T* from, int32_t count, int32_t i = 0) {
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load<kPart>(from + i));
}

// 2 * kLanes elements, in the order that is cheapest to widen: dot products do not care for it.
struct Pair {
  Floats first, second;
};

template <class T>
inline Pair load_pair(const T* from) {
  return {load(from), load(from + kLanes)};
}

// Even elements, then odd ones.
inline Pair load_pair(const bf16* from) {
  Words bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return {(Floats)(bits << 16), (Floats)(bits & 0xffff0000u)};
}

inline Pair held(Pair x) { return {held(x.first), held(x.second)}; }

inline Floats fma(Pair a, Pair b, Floats c) { return fma(a.second, b.second, fma(a.first, b.first, c)); }

inline void store_pair(float* to, Pair x) {
  store(to, x.first);
  store(to + kLanes, x.second);
}

// Bring a row of fp32, as far as whole pairs go, from the order of memory into that of load_pair, and back.
template <class T>
inline void pair_order(float*, int32_t, T) {}

template <class T>
inline void restore_order(float*, int32_t, T) {}

template <int... i>
inline Pair separate(Pair x, std::integer_sequence<int, i...>) {
  return {shuffle<(2 * i)...>(x.first, x.second), shuffle<(2 * i + 1)...>(x.first, x.second)};
}

inline void pair_order(float* row, int32_t count, bf16) {
  for (int32_t i = 0; i + 2 * kLanes <= count; i += 2 * kLanes) {
    store_pair(row + i, separate({load(row + i), load(row + i + kLanes)}, Lanes{}));
  }
}

template <int... i>
inline Pair interleave(Pair x, std::integer_sequence<int, i...>) {
  return {shuffle<(i / 2 + i % 2 * kLanes)...>(x.first, x.second),
          shuffle<(kLanes / 2 + i / 2 + i % 2 * kLanes)...>(x.first, x.second)};
}

inline void restore_order(float* row, int32_t count, bf16) {
  for (int32_t i = 0; i + 2 * kLanes <= count; i += 2 * kLanes) {
    store_pair(row + i, interleave({load(row + i), load(row + i + kLanes)}, Lanes{}));
  }
}

// Round to nearest even; a NaN keeps its sign and becomes quiet.
inline bf16 round_to(float x, bf16) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) return bf16{uint16_t(bits >> 16 | 0x40)};
  return bf16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float round_to(float x, f32) { return x; }

#if !defined(__AVX512F__)
inline Floats reciprocal(Floats x) { return 1 / x; }
#endif

#if !defined(__AVX512F__)
// 2^x for x <= 0, within 2 units in the last place; results below 2^-126 are 0 and NaN stays NaN.
//
// Adding 1.5 * 2^23 leaves the integer part of x in the low bits; the polynomial (own minimax fit, relative error
// 9.2e-8) takes the rest, in [-0.5, 0.5].
inline Floats exp2(Floats x) {
  x = maximum(splat(-127.f), x);
  const Floats shifted = x + 12582912.f;
  const Floats rest = x - (shifted - 12582912.f);
  Floats power = fma(splat(1.3264727e-3f), rest, splat(9.671513e-3f));
  power = fma(power, rest, splat(5.5507336e-2f));
  power = fma(power, rest, splat(2.4022242e-1f));
  power = fma(power, rest, splat(6.93147e-1f));
  power = fma(power, rest, splat(1.f));
  return power * (Floats)(((Words)shifted + 127) << 23);
}
#endif

// x with lane i and lane i ^ kBit exchanged.
template <int kBit, int... i>
inline Floats exchange(Floats x, std::integer_sequence<int, i...>) {
  return shuffle<(i ^ kBit)...>(x, x);
}

template <int kBit>
inline Floats exchange(Floats x) {
  return exchange<kBit>(x, Lanes{});
}

// Lane i: where bit kBit of i is clear, lanes i and i + kBit of `a` added, elsewhere lanes i and i - kBit of `b`.
template <int kBit, int... i>
inline Floats butterfly(Floats a, Floats b, std::integer_sequence<int, i...>) {
  return shuffle<(i & kBit ? i + kLanes : i)...>(a, b) + shuffle<(i & kBit ? (i ^ kBit) + kLanes : i ^ kBit)...>(a, b);
}

// Lane i is the sum of the lanes of x[i], for kLanes vectors; kBit is how far the recursion has come.
template <int kBit = 1>
inline Floats sums(const Floats* x) {
  if constexpr (kBit == kLanes) {
    return *x;
  } else {
    return butterfly<kBit>(sums<2 * kBit>(x), sums<2 * kBit>(x + kBit), Lanes{});
  }
}

// Each lane the maximum over the lanes whose numbers are equal to its own modulo `period`.
template <int period>
inline Floats maximum_over(Floats x) {
  if constexpr (period == kLanes) {
    return x;
  } else {
    x = maximum_over<2 * period>(x);
    return maximum(x, exchange<period>(x));
  }
}

}  // namespace simd
}  // namespace flashinfer
