// Scatter new K and V rows into the paged cache.
//
// CTAs take tokens in turn; a token's heads lie side by side, so consecutive threads copy consecutive vectors of them.
#pragma once

#include "page/params.h"

namespace flashinfer {
namespace page {

template <int kBytes>
struct alignas(kBytes) Vector {
  uint8_t bytes[kBytes];
};

// Grid: one CTA a worker, any number; 128 threads. kBytes divides every row, stride and address.
template <int kBytes>
__global__ void __launch_bounds__(128) append(const __grid_constant__ AppendParams p) {
  using V = Vector<kBytes>;
  const int32_t vectors = p.row_bytes / kBytes;
  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    const int32_t request = p.batch_indices[token];
    const int32_t position = p.positions[token];
    if (position < 0) continue;  // padding inserted for CUDA graphs
    const int32_t entry = p.page_indptr[request] + position / p.page_size;
    if (entry >= p.page_indptr[request + 1]) continue;  // no page has been given to this position
    const int64_t page = p.page_table[entry];
    if (page < 0) continue;
    const int64_t row = page * p.cache_stride_page + position % p.page_size * p.cache_stride_token;
    for (int32_t i = threadIdx.x; i < p.kv_heads * vectors; i += blockDim.x) {
      const int64_t head = i / vectors;
      const int64_t byte = static_cast<int64_t>(i % vectors) * kBytes;
      const int64_t target = row + head * p.cache_stride_head + byte;
      const int64_t key = token * p.key_stride_token + head * p.key_stride_head + byte;
      const int64_t value = token * p.value_stride_token + head * p.value_stride_head + byte;
      *reinterpret_cast<V*>(static_cast<uint8_t*>(p.key_cache) + target) =
          *reinterpret_cast<const V*>(static_cast<const uint8_t*>(p.key) + key);
      *reinterpret_cast<V*>(static_cast<uint8_t*>(p.value_cache) + target) =
          *reinterpret_cast<const V*>(static_cast<const uint8_t*>(p.value) + value);
    }
  }
}

}  // namespace page
}  // namespace flashinfer
