#include "lengths.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace flashinfer::host {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

[[noreturn]] void invalid(const std::string& text) { throw std::invalid_argument(text); }

std::string of(const char* name, int32_t request) { return std::string(name) + "[" + std::to_string(request) + "]"; }

// Copies and returns the greatest step.
int32_t copy_indptr(const char* name, const int32_t* from, int32_t count, int32_t* to) {
  if (from[0] < 0) invalid(of(name, 0) + " must not be negative, got " + std::to_string(from[0]));
  int32_t longest = 0;
  bool decreases = false;
  to[0] = from[0];
  for (int32_t i = 0; i < count; ++i) {
    to[i + 1] = from[i + 1];
    decreases |= from[i + 1] < from[i];
    longest = std::max(longest, static_cast<int32_t>(uint32_t(from[i + 1]) - uint32_t(from[i])));
  }
  for (int32_t i = 0; decreases; ++i) {
    if (to[i + 1] >= to[i]) continue;
    invalid(std::string(name) + " must not decrease, but " + of(name, i + 1) + " = " + std::to_string(to[i + 1]) +
            " follows " + std::to_string(to[i]));
  }
  return longest;
}

int32_t keys_of_pages(const LengthsSource& source, int32_t request, int32_t pages) {
  if (pages == 0) return 0;
  const int32_t last = source.keys[request];
  if (last < 1 || last > source.page_size) {
    invalid(of("last_page_len", request) + " must be from 1 to page_size=" + std::to_string(source.page_size) +
            ", got " + std::to_string(last));
  }
  const int64_t keys = (int64_t(pages) - 1) * source.page_size + last;
  if (keys > kInt32Max) {
    invalid("request " + std::to_string(request) + " has " + std::to_string(keys) + " keys, more than int32 holds");
  }
  return static_cast<int32_t>(keys);
}

int32_t keys_within(const LengthsSource& source, int32_t request, int32_t rows) {
  const int32_t keys = source.keys[request];
  const int64_t room = int64_t(rows) * source.page_size;
  if (keys < 0) invalid(of("kv_len", request) + " must not be negative, got " + std::to_string(keys));
  if (keys > room) {
    invalid("request " + std::to_string(request) + " has " + std::to_string(keys) +
            " keys, but kv_indptr gives it room for " + std::to_string(room));
  }
  return keys;
}

}  // namespace

LengthsFacts read_lengths(const LengthsSource& source, int32_t* out) {
  const int32_t count = source.num_requests;
  int32_t* const q_indptr = out;
  int32_t* const kv_indptr = q_indptr + count + 1;
  int32_t* const kv_len = kv_indptr + count + 1;
  int32_t longest = count > 0;
  if (source.q_indptr != nullptr) {
    longest = copy_indptr("q_indptr", source.q_indptr, count, q_indptr);
  } else {
    for (int32_t i = 0; i <= count; ++i) q_indptr[i] = i;
  }
  copy_indptr("kv_indptr", source.kv_indptr, count, kv_indptr);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t rows = kv_indptr[i + 1] - kv_indptr[i];
    kv_len[i] = source.keys == nullptr ? rows
                : source.last_pages    ? keys_of_pages(source, i, rows)
                                       : keys_within(source, i, rows);
  }
  return {q_indptr[count], longest, kv_indptr[count]};
}

}  // namespace flashinfer::host
