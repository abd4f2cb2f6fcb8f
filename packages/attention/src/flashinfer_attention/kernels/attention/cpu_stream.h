// A decode worker's keys as one stream of steps across its items, so that the next step's rows, of whichever request,
// can be fetched while this step's are computed.
#pragma once

#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

constexpr int32_t kStepKeys = 64;
constexpr int32_t kLineBytes = 64;  // of the caches

constexpr int32_t larger(int32_t a, int32_t b) { return a < b ? b : a; }

// Into the L2 only: a step ahead is more than the L1 holds.
inline void prefetch_line(const void* address) { __builtin_prefetch(address, 0, 2); }

// Some consecutive keys of an item, for all heads that the item's rows belong to.
struct KeyStep {
  WorkItem item;
  KeyRows<kStepKeys> keys;  // beyond their count the last one is repeated
  int32_t begin;            // first key
  int32_t rows;             // packed rows of the item
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
    for (int32_t i = step.keys.count; i < kStepKeys && i > 0; ++i) {
      step.keys.k[i] = step.keys.k[i - 1];
      step.keys.v[i] = step.keys.v[i - 1];
    }
    set_heads(step);
    return true;
  }

 private:
  static constexpr int32_t kStepBytes = 32 << 10;

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

}  // namespace attention
}  // namespace flashinfer
