// Scatter new rows of K and V into the paged cache on CPU threads: tokens are spread over the workers in equal ranges.
#include <cstring>

#include "page/params.h"

namespace flashinfer {
namespace page {

// Where a token goes: its page and slot. `page` is negative where it has none, which padding of a captured graph uses.
struct Slot {
  int64_t page = -1;
  int64_t token = 0;

  Slot(const AppendParams& p, int64_t token_index) {
    const int32_t position = p.positions[token_index];
    if (position < 0) return;
    const int32_t* range = p.page_indptr + p.batch_indices[token_index];
    const int64_t entry = int64_t(range[0]) + position / p.page_size;
    if (entry >= range[1]) return;
    page = p.page_table[entry];
    token = position % p.page_size;
  }
};

// The rows of all heads of a token.
inline void copy_rows(const AppendParams& p, const void* from, int64_t from_offset, int64_t from_stride, void* to,
                      int64_t to_offset) {
  const char* row = static_cast<const char*>(from) + from_offset;
  char* target = static_cast<char*>(to) + to_offset;
  for (int32_t head = 0; head < p.kv_heads; ++head, row += from_stride, target += p.cache_stride_head) {
    std::memcpy(target, row, p.row_bytes);
  }
}

inline void append(const AppendParams& p, int32_t worker, int32_t num_workers) {
  const int64_t begin = p.num_tokens * worker / num_workers;
  const int64_t end = p.num_tokens * (worker + 1) / num_workers;
  for (int64_t i = begin; i < end; ++i) {
    const Slot slot(p, i);
    if (slot.page < 0) continue;
    const int64_t to = slot.page * p.cache_stride_page + slot.token * p.cache_stride_token;
    copy_rows(p, p.key, i * p.key_stride_token, p.key_stride_head, p.key_cache, to);
    copy_rows(p, p.value, i * p.value_stride_token, p.value_stride_head, p.value_cache, to);
  }
}

}  // namespace page
}  // namespace flashinfer
