// Rotary position embedding of rows in fp32: pair (d, d + D / 2) turns by position * theta^(-2 d / D) * rcp_scale.
//
// Su et al., 2021, arXiv:2104.09864, with the halves paired as Llama does. Angles are found in double precision; from
// one position to the next the cosines and sines are turned themselves, which costs as little as turning a row.
#pragma once

#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

class Rotation {
 public:
  explicit Rotation(const AttentionParams& p) : half_(p.rope ? p.head_dim / 2 : 0) {
    for (int32_t d = 0; d < half_; ++d) {
      const double frequency = std::exp2(-double(d) / half_ * double(p.rope_log2_theta));
      turns_[d] = double(p.rope_rcp_scale) * frequency * 0.15915494309189535;
    }
    find(1, step_cos_, step_sin_);
  }

  bool active() const { return half_ > 0; }

  void seek(int32_t position) { find(position, cos_, sin_); }

  void advance() {
    for (int32_t d = 0; d < half_; ++d) {
      const float c = cos_[d];
      cos_[d] = c * step_cos_[d] - sin_[d] * step_sin_[d];
      sin_[d] = sin_[d] * step_cos_[d] + c * step_sin_[d];
    }
  }

  void turn(float* row) const { turn(row, cos_, sin_); }

  void turn(float* row, const float* cosines, const float* sines) const {
    float* other = row + half_;
    for (int32_t d = 0; d < half_; ++d) {
      const float x = row[d], y = other[d];
      row[d] = x * cosines[d] - y * sines[d];
      other[d] = y * cosines[d] + x * sines[d];
    }
  }

  // Of the present position, head_dim / 2 of each.
  const float* cosines() const { return cos_; }
  const float* sines() const { return sin_; }

 private:
  int32_t half_;
  double turns_[kMaxHeadDim / 2];  // of the circle, from one position to the next
  alignas(64) float cos_[kMaxHeadDim / 2];
  alignas(64) float sin_[kMaxHeadDim / 2];
  alignas(64) float step_cos_[kMaxHeadDim / 2];
  alignas(64) float step_sin_[kMaxHeadDim / 2];

  // Of half the angle, in [-pi / 2, pi / 2], by Taylor's series; then doubled.
  void find(int32_t position, float* cosines, float* sines) const {
    for (int32_t d = 0; d < half_; ++d) {
      const double turned = position * turns_[d];
      const float x = float(turned - std::rint(turned)) * 3.14159265f;
      const float y = x * x;
      float s = -1 / 39916800.f;
      s = s * y + 1 / 362880.f;
      s = s * y - 1 / 5040.f;
      s = s * y + 1 / 120.f;
      s = s * y - 1 / 6.f;
      s = s * y * x + x;
      float c = 1 / 479001600.f;
      c = c * y - 1 / 3628800.f;
      c = c * y + 1 / 40320.f;
      c = c * y - 1 / 720.f;
      c = c * y + 1 / 24.f;
      c = c * y - 0.5f;
      c = c * y + 1;
      cosines[d] = 1 - 2 * s * s;
      sines[d] = 2 * s * c;
    }
  }
};

}  // namespace attention
}  // namespace flashinfer
