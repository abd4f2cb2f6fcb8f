// A decode worker's keys as one stream of steps across its items, so that the next step's rows, of whichever request,
// can be fetched while this step's are computed.
#pragma once

#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

constexpr int32_t kStepKeys = 64;

// Some consecutive keys of an item, for all heads that the item's rows belong to.
struct KeyStep {
  WorkItem item;
  KeyRows<kStepKeys> keys;
  int32_t begin;  // first key
  int32_t rows;   // packed rows of the item
  int32_t head_begin, head_end;
  bool first, last;  // of the item
};

class KeyStream {
 public:
  // `row_bytes` are those of one key of one head. A step of two matrices should leave room for the next in the L2.
  KeyStream(const AttentionParams& p, const WorkerItems& items, int32_t tile_rows, int32_t row_bytes)
      : p_(p), items_(items), tile_rows_(tile_rows) {
    step_keys_ = clamp(kStepBytes / (row_bytes * p.kv_heads) / 16 * 16, 16, kStepKeys);
  }

  // False, and no keys, at the end.
  bool next(KeyStep& step) {
    step.keys.count = 0;
    step.first = at_ >= item_.kv_end;
    if (step.first) {
      if (!items_.next(item_)) return false;
      at_ = item_.kv_begin;
    }
    step.item = item_;
    step.begin = at_;
    at_ = smaller(at_ + step_keys_, item_.kv_end);
    step.last = at_ >= item_.kv_end;
    step.keys.locate(p_, item_.kv_start, step.begin, at_);
    set_heads(step);
    return true;
  }

 private:
  static constexpr int32_t kStepBytes = 64 << 10;

  void set_heads(KeyStep& step) const {
    const int32_t heads = p_.kv_heads * p_.group;
    step.rows = smaller(tile_rows_, item_.q_len * heads - item_.row_begin);
    const int32_t first = item_.row_begin % heads;
    const bool wraps = first + step.rows > heads;  // into the next query
    step.head_begin = wraps ? 0 : first / p_.group;
    step.head_end = wraps ? p_.kv_heads : (first + step.rows - 1) / p_.group + 1;
  }

  const AttentionParams& p_;
  WorkerItems items_;
  WorkItem item_{};
  int32_t tile_rows_;
  int32_t step_keys_;
  int32_t at_ = 0;
};

// Fetches the rows of a step into the cache, a few at a time, in the order of memory: key by key, head by head.
class RowPrefetch {
 public:
  // The rows are spread over `calls` of `advance`.
  RowPrefetch(const void* base, const int64_t* offsets, const KeyStep& step, int64_t stride_head, int32_t element_bytes,
              int32_t head_dim, int32_t calls)
      : base_(static_cast<const char*>(base) + step.head_begin * stride_head * element_bytes),
        offsets_(offsets),
        stride_head_(stride_head * element_bytes),
        element_bytes_(element_bytes),
        row_bytes_(head_dim * element_bytes),
        heads_(step.head_end - step.head_begin),
        keys_(step.keys.count),
        quota_(ceil_div(heads_ * keys_, calls < 1 ? 1 : calls)) {}

  void advance() {
    for (int32_t i = 0; i < quota_ && key_ < keys_; ++i) {
      const char* row = base_ + offsets_[key_] * element_bytes_ + head_ * stride_head_;
      for (int32_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte);
      if (++head_ == heads_) {
        head_ = 0;
        ++key_;
      }
    }
  }

 private:
  const char* base_;
  const int64_t* offsets_;
  int64_t stride_head_;
  int32_t element_bytes_;
  int32_t row_bytes_;
  int32_t heads_;
  int32_t keys_;
  int32_t quota_;
  int32_t key_ = 0;
  int32_t head_ = 0;
};

}  // namespace attention
}  // namespace flashinfer
