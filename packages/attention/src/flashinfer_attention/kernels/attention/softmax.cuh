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

// Turn scores into exp2(scale * s - max), update the state and return what earlier results must be multiplied by.
template <int kKeyBlocks>
__device__ void softmax(Accumulator (&s)[kKeyBlocks], RowState& state, float scale, float (&correction)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = negative_infinity();
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
      largest = fmaxf(largest, fmaxf(s[block].x[2 * half], s[block].x[2 * half + 1]));
    }
    const float max = fmaxf(state.max[half], quad_max(largest) * scale);
    const float zero = finite_or_zero(max);
    correction[half] = exp2_approx(state.max[half] - zero);
    float sum = 0.0f;
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[block].x[i] = exp2_approx(fmaf(s[block].x[i], scale, -zero));
        sum += s[block].x[i];
      }
    }
    state.max[half] = max;
    state.sum[half] = state.sum[half] * correction[half] + sum;
  }
}

// Two neighbouring score accumulators as operand A of P V.
template <typename T>
__device__ FragmentA probabilities(const Accumulator& low, const Accumulator& high) {
  return {{pack<T>(low.x[0], low.x[1]), pack<T>(low.x[2], low.x[3]), pack<T>(high.x[0], high.x[1]),
           pack<T>(high.x[2], high.x[3])}};
}

// The natural log-sum-exp of a row; -inf where it has seen no key.
__device__ inline float natural_lse(float max, float sum) { return (max + log2_approx(sum)) * kLn2; }

// What turns a weighted sum of values into their mean; 0 where the row has seen no key.
__device__ inline float inverse_sum(float sum) { return sum > 0.0f ? 1.0f / sum : 0.0f; }

}  // namespace attention
}  // namespace flashinfer
