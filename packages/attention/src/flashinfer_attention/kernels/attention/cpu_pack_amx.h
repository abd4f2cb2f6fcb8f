// Rows of bf16 as operands of AMX products, and its results as rows.
//
// A left operand holds 16 rows of 32 elements, a right one 16 pairs of elements of 16 rows side by side.
#pragma once

#include "core/amx.h"
#include "core/avx512.h"

namespace flashinfer {
namespace attention {

// 16 rows as right operands, one for each 32 elements up to `padded`, beyond `dim` zero. `sign` is flipped in each
// pair.
inline void pack_right(const bf16* const* rows, int32_t dim, int32_t padded, uint32_t sign, bf16* to) {
  for (int32_t d = 0; d < dim; d += 8) {
    simd::Bytes x[4];
    for (int32_t i = 0; i < 4; ++i) x[i] = simd::join(rows[i] + d, rows[4 + i] + d, rows[8 + i] + d, rows[12 + i] + d);
    simd::transpose_parts<uint32_t>(x);
    for (int32_t i = 0; i < 4; ++i) simd::store_bytes(to + 16 * d + 32 * i, (simd::Bytes)((simd::Words)x[i] ^ sign));
  }
  for (int32_t d = dim; d < padded; d += 2) simd::store_bytes(to + 16 * d, simd::Bytes{});
}

// 32 rows, transposed, as left operands: one for each 16 elements, `stride` elements apart.
inline void pack_left_transposed(const bf16* const* rows, int32_t dim, bf16* to, int32_t stride) {
  for (int32_t d = 0; d < dim; d += 8) {
    simd::Bytes x[8];
    for (int32_t i = 0; i < 8; ++i) x[i] = simd::join(rows[i] + d, rows[8 + i] + d, rows[16 + i] + d, rows[24 + i] + d);
    simd::transpose_parts<uint16_t>(x);
    bf16* block = to + d / 16 * stride + d % 16 * 32;
    for (int32_t i = 0; i < 8; ++i) simd::store_bytes(block + 32 * i, x[i]);
  }
}

// 16 rows from results that hold them transposed, each 16 of their elements.
template <int32_t kStride>
void unpack_transposed(const float* from, int32_t dim, float (*rows)[kStride]) {
  for (int32_t d = 0; d < dim; d += 16, from += 256) {
    for (int32_t row = 0; row < 16; row += 4) {
      simd::Bytes x[4];
      for (int32_t i = 0; i < 4; ++i) {
        const float* part = from + 16 * i + row;
        x[i] = simd::join(part, part + 64, part + 128, part + 192);
      }
      simd::transpose_parts<uint32_t>(x);
      for (int32_t i = 0; i < 4; ++i) simd::store_bytes(rows[row + i] + d, x[i]);
    }
  }
}

}  // namespace attention
}  // namespace flashinfer
