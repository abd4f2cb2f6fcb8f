// Online softmax over the score fragments of one warp (Milakov and Gimelshein, 2018, arXiv:1805.02867).
//
// Scores stay unscaled; the scale and log2(e) are folded into one multiplication inside the base-2 exponential.
#pragma once

#include "attention/tile.cuh"
#include "core/math.cuh"

namespace flashinfer {
namespace attention {

// State of the two rows (l / 4 and l / 4 + 8) that lane l holds of a 16-row fragment.
struct RowState {
  float max[2];  // largest score so far, times the scale; base 2
  float sum[2];  // of this lane's columns; `attend` adds those of the row's other lanes last
};

__device__ inline RowState empty_rows() { return {{negative_infinity(), negative_infinity()}, {0.0f, 0.0f}}; }

// The exponent's zero point: a row that has seen no key must not compute -inf - -inf.
__device__ inline float finite_or_zero(float max) { return max == negative_infinity() ? 0.0f : max; }

// Raise the state's maxima to those of the scores and return what earlier results must be multiplied by.
template <int kKeyBlocks>
__device__ void raise_max(const Accumulator (&s)[kKeyBlocks], RowState& state, float scale, float (&correction)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = negative_infinity();
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
      largest = fmaxf(largest, fmaxf(s[block].x[2 * half], s[block].x[2 * half + 1]));
    }
    const float max = fmaxf(state.max[half], quad_max(largest) * scale);
    correction[half] = exp2_approx(state.max[half] - finite_or_zero(max));
    state.max[half] = max;
    state.sum[half] *= correction[half];
  }
}

// P = exp2(scale * s - max) of 16 keys as operand A of P V. Their sum goes to the state, before they are rounded.
template <typename T>
__device__ FragmentA probabilities(const Accumulator& low, const Accumulator& high, RowState& state, float scale) {
  float p[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float zero = finite_or_zero(state.max[half]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[half][i] = exp2_approx(fmaf((i < 2 ? low : high).x[2 * half + i % 2], scale, -zero));
    }
    state.sum[half] += (p[half][0] + p[half][1]) + (p[half][2] + p[half][3]);
  }
  return {{pack<T>(p[0][0], p[0][1]), pack<T>(p[1][0], p[1][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][2], p[1][3])}};
}

// The natural log-sum-exp of a row; -inf where it has seen no key.
__device__ inline float natural_lse(float max, float sum) { return (max + log2_approx(sum)) * kLn2; }

// What turns a weighted sum of values into their mean; 0 where the row has seen no key.
__device__ inline float inverse_sum(float sum) { return sum > 0.0f ? 1.0f / sum : 0.0f; }

}  // namespace attention
}  // namespace flashinfer
