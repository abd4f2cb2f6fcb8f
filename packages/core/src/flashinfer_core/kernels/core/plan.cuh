// Plan lengths that lie on the device, where the host never sees them: one CTA makes the plan that the host would make.
#pragma once

#include "core/plan_lengths.h"

namespace flashinfer {

// The threads of a CTA. Sums go through shared memory, each round over twice the distance of the one before.
template <int kThreads>
struct Cta {
  unsigned char* shared;  // [kThreads] of the largest type that is summed

  __device__ static constexpr int32_t size() { return kThreads; }
  __device__ static int32_t index() { return static_cast<int32_t>(threadIdx.x); }
  __device__ static void sync() { __syncthreads(); }

  // Leaves the sum over the threads up to i in slot i.
  template <class T>
  __device__ T* inclusive(T value) const {
    T* const slots = reinterpret_cast<T*>(shared);
    __syncthreads();  // the sum before has been read
    slots[index()] = value;
    for (int32_t distance = 1; distance < kThreads; distance *= 2) {
      __syncthreads();
      const T nearer = index() >= distance ? slots[index() - distance] : T();
      __syncthreads();
      slots[index()].add(nearer);
    }
    __syncthreads();
    return slots;
  }
  template <class T>
  __device__ T exclusive(const T& value) const {
    const T* const slots = inclusive(value);
    return index() > 0 ? slots[index() - 1] : T();
  }
  template <class T>
  __device__ T total(const T& value) const {
    return inclusive(value)[kThreads - 1];
  }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) plan(const __grid_constant__ PlanParams p) {
  __shared__ alignas(16) unsigned char shared[kThreads * sizeof(PlanSums)];
  plan_lengths(Cta<kThreads>{shared}, p);
}

}  // namespace flashinfer
