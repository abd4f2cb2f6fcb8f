// What the kernel that merges attention states takes, on every target. Strides count elements.
#pragma once

#include "core/types.h"

namespace flashinfer {
namespace attention {

// States of rows: o is [tokens, states, heads, head_dim] with a contiguous last dimension, lse [tokens, states, heads].
struct StateRows {
  const void* o;
  const float* lse;
  int64_t o_stride_token;
  int64_t o_stride_state;
  int64_t o_stride_head;
  int64_t lse_stride_token;
  int64_t lse_stride_state;
  int64_t lse_stride_head;
};
static_assert(sizeof(StateRows) == 64, "host and device disagree on StateRows");

struct StatesParams {
  StateRows first;        // state 0 of each token
  StateRows others;       // states 1 and up
  void* o;                // [tokens, heads, head_dim], may be where `first` lies
  float* lse;             // [tokens, heads]; likewise
  const int32_t* indptr;  // [tokens + 1], where each token's states begin, counted in states; null: `states` for each
  const uint8_t* mask;    // [tokens], 0 leaves a token as it is; null: all are merged
  int64_t o_stride_token;
  int64_t o_stride_head;
  int64_t lse_stride_token;
  int64_t lse_stride_head;
  int64_t tokens;
  int32_t states;
  int32_t heads;
  int32_t head_dim;
  int32_t in_place;  // 1: lse is that of `first`, so all of a row is read before it is written
  float to_log2;     // times an lse is one in base 2: log2(e) where lse is natural
  int32_t pad;
};
static_assert(sizeof(StatesParams) == 224, "host and device disagree on StatesParams");

}  // namespace attention
}  // namespace flashinfer
