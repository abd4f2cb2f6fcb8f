// Scatter new K and V rows into the paged cache.
//
// CTAs take tokens in turn; a token's heads lie side by side, so consecutive threads copy consecutive vectors of them.
// A thread reads the rows of several tokens before it asks where they go, which takes three reads one after another.
#pragma once

#include "page/params.h"

namespace flashinfer {
namespace page {

// What a thread copies at once: whole words, which the compiler does not take apart.
template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using Type = uint4;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<4> {
  using Type = uint32_t;
};
template <>
struct VectorOf<2> {
  using Type = uint16_t;
};

constexpr int kTokensAhead = 4;  // tokens whose rows a thread has under way

// Find where the rows of tokens `first`, `first + step` and so on go, in bytes from the start of a cache; negative
// where they have no place. Each of the three reads is under way for all of them at once.
__device__ inline void find_places(const AppendParams& p, int64_t first, int64_t step,
                                   int64_t (&places)[kTokensAhead]) {
  int32_t request[kTokensAhead], position[kTokensAhead], entry[kTokensAhead], end[kTokensAhead];
#pragma unroll
  for (int j = 0; j < kTokensAhead; ++j) {
    const int64_t token = first + j * step;
    const bool exists = token < p.num_tokens;
    request[j] = exists ? p.batch_indices[token] : 0;
    position[j] = exists ? p.positions[token] : -1;  // -1 is padding inserted for CUDA graphs
  }
#pragma unroll
  for (int j = 0; j < kTokensAhead; ++j) {
    const bool is_token = position[j] >= 0;
    entry[j] = is_token ? p.page_indptr[request[j]] + position[j] / p.page_size : 0;
    end[j] = is_token ? p.page_indptr[request[j] + 1] : 0;
  }
#pragma unroll
  for (int j = 0; j < kTokensAhead; ++j) {
    const int64_t page = entry[j] < end[j] ? p.page_table[entry[j]] : -1;  // else no page has been given to it
    places[j] = page < 0 ? -1 : page * p.cache_stride_page + position[j] % p.page_size * p.cache_stride_token;
  }
}

template <typename V>
__device__ V load(const void* base, int64_t byte) {
  return *reinterpret_cast<const V*>(static_cast<const uint8_t*>(base) + byte);
}

template <typename V>
__device__ void store(void* base, int64_t byte, V value) {
  *reinterpret_cast<V*>(static_cast<uint8_t*>(base) + byte) = value;
}

// Grid: one CTA a worker, any number; 128 threads. kBytes divides every row, stride and address.
template <int kBytes>
__global__ void __launch_bounds__(128) append(const __grid_constant__ AppendParams p) {
  using V = typename VectorOf<kBytes>::Type;
  const int32_t vectors = p.row_bytes / kBytes;
  const int64_t step = gridDim.x;
  for (int64_t first = blockIdx.x; first < p.num_tokens; first += kTokensAhead * step) {
    for (int32_t i = threadIdx.x; i < p.kv_heads * vectors; i += blockDim.x) {
      const int64_t head = i / vectors;
      const int64_t byte = static_cast<int64_t>(i % vectors) * kBytes;
      V key[kTokensAhead] = {};
      V value[kTokensAhead] = {};
#pragma unroll
      for (int j = 0; j < kTokensAhead; ++j) {
        const int64_t token = first + j * step;
        if (token >= p.num_tokens) continue;
        key[j] = load<V>(p.key, token * p.key_stride_token + head * p.key_stride_head + byte);
        value[j] = load<V>(p.value, token * p.value_stride_token + head * p.value_stride_head + byte);
      }
      int64_t places[kTokensAhead];
      find_places(p, first, step, places);
#pragma unroll
      for (int j = 0; j < kTokensAhead; ++j) {
        if (places[j] < 0) continue;
        store(p.key_cache, places[j] + head * p.cache_stride_head + byte, key[j]);
        store(p.value_cache, places[j] + head * p.cache_stride_head + byte, value[j]);
      }
    }
  }
}

}  // namespace page
}  // namespace flashinfer
