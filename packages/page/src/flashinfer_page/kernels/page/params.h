// What the append kernel takes, on every target. Strides count bytes, so one kernel serves all element types;
// the last dimension is contiguous.
#pragma once

#include "core/types.h"

namespace flashinfer {
namespace page {

struct AppendParams {
  const void* key;               // [tokens, kv_heads, head_dim]
  const void* value;             // as key
  void* key_cache;               // [pages, page_size, kv_heads, head_dim]
  void* value_cache;             // as key_cache
  const int32_t* batch_indices;  // [tokens]: request of each token
  const int32_t* positions;      // [tokens]: position of each token in its request; negative skips the token
  const int32_t* page_table;     // page numbers of all requests; a negative one skips its tokens
  const int32_t* page_indptr;    // [requests + 1], into page_table
  int64_t num_tokens;
  int64_t key_stride_token;
  int64_t key_stride_head;
  int64_t value_stride_token;
  int64_t value_stride_head;
  int64_t cache_stride_page;
  int64_t cache_stride_token;
  int64_t cache_stride_head;
  int32_t kv_heads;
  int32_t row_bytes;  // bytes of one head's row
  int32_t page_size;
  int32_t pad;
};
static_assert(sizeof(AppendParams) == 144, "host and device disagree on AppendParams");

}  // namespace page
}  // namespace flashinfer
