// Intel AMX: eight tile registers of 16 rows x 64 bytes and the product of two of them, one instruction a function.
//
// A tile's number is a template argument, for it is part of the instruction. Linux must have let the process use tiles
// (permit_tiles in flashinfer_core/device.py).
#pragma once

#include <cstdint>

namespace flashinfer {
namespace amx {

constexpr int32_t kRows = 16;
constexpr int32_t kRowBytes = 64;
constexpr int32_t kTileBytes = kRows * kRowBytes;

// The tiles of this thread, all of full size, as long as it lives.
class Tiles {
 public:
  Tiles() {
    Shapes shapes = {1, 0, {}, {}, {}};
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kRowBytes;
      shapes.rows[tile] = kRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// `stride` counts bytes from row to row.
template <int kTile>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}

template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// C[i][j] += A[i][2k] B[k][2j] + A[i][2k + 1] B[k][2j + 1]: bf16 products of 16 x 32 and 32 x 16, added in fp32.
template <int c, int a, int b>
inline void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace amx
}  // namespace flashinfer
