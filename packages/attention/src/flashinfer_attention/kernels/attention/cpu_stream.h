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
  KeyRows<kStepKeys> keys;  // beyond their count the last one is repeated
  int32_t begin;            // first key
  int32_t rows;             // packed rows of the item
  bool first, last;         // of the item
};

class KeyStream {
 public:
  KeyStream(const AttentionParams& p, const WorkerItems& items, int32_t tile_rows)
      : p_(p), items_(items), tile_rows_(tile_rows) {}

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
    at_ = smaller(at_ + kStepKeys, item_.kv_end);
    step.last = at_ >= item_.kv_end;
    step.keys.locate(p_, item_.kv_start, step.begin, at_);
    for (int32_t i = step.keys.count; i < kStepKeys && i > 0; ++i) {
      step.keys.k[i] = step.keys.k[i - 1];
      step.keys.v[i] = step.keys.v[i - 1];
    }
    step.rows = smaller(tile_rows_, item_.q_len * p_.kv_heads * p_.group - item_.row_begin);
    return true;
  }

 private:
  const AttentionParams& p_;
  WorkerItems items_;
  WorkItem item_{};
  int32_t tile_rows_;
  int32_t at_ = 0;
};

}  // namespace attention
}  // namespace flashinfer
