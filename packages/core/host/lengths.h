// Lengths of a batch as callers have them, checked and copied in one pass.
#pragma once

#include <cstdint>

namespace flashinfer::host {

struct LengthsSource {
  const int32_t* q_indptr;   // [requests + 1]; null: one query each
  const int32_t* kv_indptr;  // [requests + 1]
  const int32_t* keys;       // [requests]: keys, or those in each request's last page; null: all rows
  int32_t num_requests;
  int32_t page_size;  // keys that an entry of kv_indptr stands for; 1 where ragged
  bool last_pages;    // what `keys` counts. A request without pages has no key, and then it is not read
};

struct LengthsFacts {
  int32_t tokens;   // queries of all requests
  int32_t longest;  // queries of the longest request
  int32_t entries;  // rows or pages of all requests
};

// Writes q_indptr [requests + 1], kv_indptr [requests + 1] and kv_len [requests] one after another to `out`.
// Throws std::invalid_argument that names the request.
LengthsFacts read_lengths(const LengthsSource& source, int32_t* out);

}  // namespace flashinfer::host
