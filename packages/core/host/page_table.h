// Reading page tables before a kernel trusts them: one pass over the entries that it will use.
#pragma once

#include <cstdint>
#include <optional>

namespace flashinfer::host {

// The page tables of a batch, all in host memory.
struct PageTable {
  const int32_t* pages;   // [entries]
  const int32_t* indptr;  // [requests + 1], into `pages`
  int32_t requests;
  int64_t entries;
  int32_t page_size;
  int64_t num_pages;  // of the cache
};

// What a batch reads: queries and keys of each request, and the window (-1: none).
struct PageReads {
  const int32_t* q_indptr;  // [requests + 1]
  const int32_t* kv_len;    // [requests]
  int32_t window_left;
};

// A used entry that names no page of the cache: the number `page` as entry `index` of `request`.
struct BadPage {
  int32_t request;
  int32_t index;
  int32_t page;
};

// The first bad page that attention would read. Requests must have room in the table for their keys.
std::optional<BadPage> find_bad_page(const PageTable& table, const PageReads& reads);

enum class BadTarget { kRequest, kPosition, kEntry, kPage };

// Where a token was to be written, and why it cannot be: `value` is the request, position, table entry or page.
struct BadAppend {
  BadTarget kind;
  int64_t token;
  int32_t request;
  int32_t position;
  int64_t value;
};

// The first token that append cannot write. Negative positions are skipped; so are, unless `strict`, positions beyond
// the pages of their request, as the kernel does.
std::optional<BadAppend> find_bad_append(const PageTable& table, const int32_t* batch_indices, const int32_t* positions,
                                         int64_t tokens, bool strict);

}  // namespace flashinfer::host
