#include "page_table.h"

#include <algorithm>

namespace flashinfer::host {
namespace {

// What int32 can name.
constexpr int64_t kMostPages = int64_t(1) << 31;

// Negative pages are large when they are read as unsigned, so one comparison serves both limits.
bool all_below(const int32_t* pages, int64_t count, uint32_t limit) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(pages[i]));
  return count == 0 || largest < limit;
}

}  // namespace

std::optional<BadPage> find_bad_page(const PageTable& table, const PageReads& reads) {
  const uint32_t limit = static_cast<uint32_t>(std::min(table.num_pages, kMostPages));
  for (int32_t request = 0; request < table.requests; ++request) {
    const int64_t queries = int64_t(reads.q_indptr[request + 1]) - reads.q_indptr[request];
    const int64_t keys = reads.kv_len[request];
    if (queries <= 0 || keys <= 0) continue;
    // The first query sees the oldest key.
    const int64_t oldest = reads.window_left < 0 ? 0 : std::max<int64_t>(0, keys - queries - reads.window_left);
    if (oldest >= keys) continue;
    const int32_t* pages = table.pages + table.indptr[request];
    const int64_t end = (keys + table.page_size - 1) / table.page_size;
    int64_t index = oldest / table.page_size;
    if (all_below(pages + index, end - index, limit)) continue;
    while (static_cast<uint32_t>(pages[index]) < limit) ++index;
    return BadPage{request, static_cast<int32_t>(index), pages[index]};
  }
  return std::nullopt;
}

std::optional<BadAppend> find_bad_append(const PageTable& table, const int32_t* batch_indices, const int32_t* positions,
                                         int64_t tokens, bool strict) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int32_t position = positions[token];
    if (position < 0) continue;
    const int32_t request = batch_indices[token];
    const auto bad = [&](BadTarget kind, int64_t value) { return BadAppend{kind, token, request, position, value}; };
    if (request < 0 || request >= table.requests) return bad(BadTarget::kRequest, request);
    const int64_t entry = int64_t(table.indptr[request]) + position / table.page_size;
    if (entry >= table.indptr[request + 1]) {
      if (strict) return bad(BadTarget::kPosition, position);
      continue;
    }
    if (entry < 0 || entry >= table.entries) return bad(BadTarget::kEntry, entry);
    const int32_t page = table.pages[entry];
    if (page < 0 || page >= table.num_pages) return bad(BadTarget::kPage, page);
  }
  return std::nullopt;
}

}  // namespace flashinfer::host
