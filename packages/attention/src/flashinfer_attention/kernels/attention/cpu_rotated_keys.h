// Some keys of a request as rows of fp32, rotated by their positions: angles are found once for all heads.
#pragma once

#include "attention/cpu_rope.h"

namespace flashinfer {
namespace attention {

template <int32_t kKeys>
class RotatedKeys {
 public:
  explicit RotatedKeys(const AttentionParams& p)
      : rotation_(p), head_dim_(p.head_dim), stride_(round_up(p.head_dim, simd::kLanes) + simd::kLanes) {}

  bool active() const { return rotation_.active(); }

  // Rotate a query in the order of memory.
  void turn_query(float* q, int32_t position) {
    rotation_.seek(position);
    rotation_.turn(q);
  }

  // Find the angles of kKeys positions from `position` on. No head's keys are here yet.
  void seek(int32_t position) {
    head_ = -1;
    rotation_.seek(position);
    for (int32_t i = 0; i < kKeys; ++i, rotation_.advance()) {
      __builtin_memcpy(cos_ + i * kHalf, rotation_.cosines(), head_dim_ / 2 * sizeof(float));
      __builtin_memcpy(sin_ + i * kHalf, rotation_.sines(), head_dim_ / 2 * sizeof(float));
    }
  }

  // Turn keys [begin, end) of those positions, unless this head's are here already. `rows` begin at key 0.
  template <class T>
  void turn(int32_t kv_head, const T* const* rows, int32_t begin, int32_t end) {
    if (kv_head == head_) return;
    head_ = kv_head;
    for (int32_t i = begin; i < end; ++i) {
      simd::widen_row(row(i), rows[i], head_dim_);
      rotation_.turn(row(i), cos_ + i * kHalf, sin_ + i * kHalf);
    }
  }

  float* row(int32_t key) { return rows_ + key * stride_; }

 private:
  static constexpr int32_t kHalf = kMaxHeadDim / 2;

  Rotation rotation_;
  int32_t head_dim_;
  int32_t stride_;
  int32_t head_ = -1;  // whose keys are here
  alignas(64) float rows_[kKeys * (kMaxHeadDim + simd::kLanes)];
  float cos_[kKeys * kHalf];
  float sin_[kKeys * kHalf];
};

}  // namespace attention
}  // namespace flashinfer
