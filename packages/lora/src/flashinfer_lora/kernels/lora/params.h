// What the LoRA kernel takes, on every target. Strides count elements; the last dimension is contiguous.
#pragma once

#include "core/types.h"

namespace flashinfer {
namespace lora {

constexpr int32_t kMaxRank = 512;

struct LoraParams {
  const void* x;           // [tokens, in_features]
  void* y;                 // [tokens, out_features], added to
  const void* a;           // [adapters, rank, in_features]
  const void* b;           // [adapters, out_features, rank]
  const int32_t* indices;  // [tokens]: adapter of each token; outside [0, adapters): none
  const float* scales;     // [adapters]; null: 1
  int64_t num_tokens;
  int64_t x_stride_token;
  int64_t y_stride_token;
  int64_t a_stride_adapter;
  int64_t a_stride_rank;
  int64_t b_stride_adapter;
  int64_t b_stride_feature;
  int32_t adapters;
  int32_t rank;         // 1 to kMaxRank
  int32_t in_features;  // a multiple of 8
  int32_t out_features;
};
static_assert(sizeof(LoraParams) == 120, "host and device disagree on LoraParams");

}  // namespace lora
}  // namespace flashinfer
