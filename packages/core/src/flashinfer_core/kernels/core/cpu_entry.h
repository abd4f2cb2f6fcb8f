// The door of a CPU image: from the untyped call of the executor to a kernel and its parameter struct.
//
// Only CPU translation units include this; the struct's type is read off the kernel's own signature.
#pragma once

#include "core/types.h"

namespace flashinfer {

template <typename Params>
using CpuKernel = void (*)(const Params& params, int32_t worker, int32_t num_workers);

template <auto kKernel>
struct CpuEntry;

template <typename Params, CpuKernel<Params> kKernel>
struct CpuEntry<kKernel> {
  static void call(const void* params, int32_t worker, int32_t num_workers) {
    kKernel(*static_cast<const Params*>(params), worker, num_workers);
  }
};

template <auto kKernel>
inline void enter(const void* params, int32_t worker, int32_t num_workers) {
  CpuEntry<kKernel>::call(params, worker, num_workers);
}

}  // namespace flashinfer

// The compiler hides all else (-fvisibility=hidden), so the executor's one symbol is declared visible here.
extern "C" __attribute__((visibility("default"))) void flashinfer_entry(const void* params, int32_t worker,
                                                                        int32_t num_workers);
