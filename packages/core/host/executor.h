// Runs the workers of CPU kernels on this process' threads.
//
// A call becomes a job that its caller drains itself while parked threads join it; whoever is free takes the next
// worker number. So a call needs no free thread to make progress, and calls from several threads share one pool.
#pragma once

#include <cstdint>

namespace flashinfer::host {

using CpuEntryPoint = void (*)(const void* params, int32_t worker, int32_t num_workers);

// Calls entry(params, w, workers) once for each w of [0, workers) from up to `threads` threads, the caller's among
// them; returns when all are done. Safe in a child after fork, whose pool starts anew with its first call.
void execute(CpuEntryPoint entry, const void* params, int32_t workers, int32_t threads);

// Parked or working threads of this process' pool.
int32_t pool_threads();

}  // namespace flashinfer::host
