// Add the low-rank update of each token's own adapter on CPU threads: y += scale * (x A^T) B^T, tokens spread over the
// workers in turn. Both products accumulate in fp32, and x A^T stays fp32 between them.
#include "core/simd.h"
#include "lora/params.h"

namespace flashinfer {
namespace lora {

template <class T>
float dot(const T* a, const T* b, int32_t count) {
  simd::Floats sum{};
  int32_t i = 0;
  for (; i + simd::kLanes <= count; i += simd::kLanes) sum = simd::fma(simd::load(a + i), simd::load(b + i), sum);
  float total = 0;
  for (; i < count; i += simd::kPart) {
    const simd::Floats product = simd::load<simd::kPart>(a + i) * simd::load<simd::kPart>(b + i);
    for (int lane = 0; lane < simd::kPart; ++lane) total += product[lane];
  }
  for (int lane = 0; lane < simd::kLanes; ++lane) total += sum[lane];
  return total;
}

template <class T>
float widen(T x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return simd::widen(simd::load_bits<1>(&x), T{})[0];
  }
}

template <class T>
void lora(const LoraParams& p, int32_t worker, int32_t num_workers) {
  for (int64_t token = worker; token < p.num_tokens; token += num_workers) {
    const int32_t adapter = p.indices[token];
    if (adapter < 0 || adapter >= p.adapters) continue;
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride_token;
    const T* a = static_cast<const T*>(p.a) + adapter * p.a_stride_adapter;
    const T* b = static_cast<const T*>(p.b) + adapter * p.b_stride_adapter;
    T* y = static_cast<T*>(p.y) + token * p.y_stride_token;
    const float scale = p.scales == nullptr ? 1 : p.scales[adapter];
    float low[kMaxRank];
    for (int32_t r = 0; r < p.rank; ++r) low[r] = dot(x, a + r * p.a_stride_rank, p.in_features);
    for (int32_t feature = 0; feature < p.out_features; ++feature) {
      const T* row = b + feature * p.b_stride_feature;
      float sum = 0;
      for (int32_t r = 0; r < p.rank; ++r) sum += low[r] * widen(row[r]);
      y[feature] = simd::round_to(widen(y[feature]) + scale * sum, T{});
    }
  }
}

}  // namespace lora
}  // namespace flashinfer
