// Checks and buffer arithmetic around the plan of kernels/core/plan.h, for lengths in host memory.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/plan.h"
#include "core/uniform.h"

namespace flashinfer::host {

// The caller's buffer cannot hold the plan.
struct BufferTooSmall : std::length_error {
  using std::length_error::length_error;
};

// The partial buffers cannot hold pieces of fixed length.
struct PartialTooSmall : std::length_error {
  using std::length_error::length_error;
};

// Byte offsets in a plan's buffer. They depend on maxima only: a captured CUDA graph stays valid.
struct PlanOffsets {
  int64_t num_merges;
  int64_t merges;
  int64_t arrivals;
  int64_t items;
};

struct PlanResult {
  PlanCounts counts;
  int64_t partial_rows;
  int64_t used_bytes;
};

struct UniformResult {
  UniformWork work;
  int64_t num_items;
  int64_t partial_rows;
};

// What no plan of at most some maxima exceeds.
struct PlanLimits {
  int64_t merges;
  int64_t bytes;
};

PlanOffsets plan_offsets(int64_t num_workers, int64_t max_merges);

PlanLimits plan_limits(const PlanShape& shape, int64_t total_q, int64_t num_requests);

// Throws std::invalid_argument for lengths that make no sense, BufferTooSmall, PartialTooSmall; writes nothing then.
PlanResult plan(const PlanShape& shape, const PlanLengths& lengths, int64_t max_partial_rows, int64_t max_merges,
                void* out, int64_t out_bytes);

// Rows of the partial buffers that pieces of fixed length need.
int64_t fixed_rows(const PlanShape& shape, const PlanLengths& lengths);

// What fixed_rows gives at most for one request of these maxima.
int64_t most_fixed_rows(const PlanShape& shape, int32_t max_q_len, int32_t max_kv_len);

// `work` with equal pieces so many that kv_heads * tiles * pieces fills the workers well.
UniformResult uniform_plan(const PlanShape& shape, int32_t q_len, int32_t kv_len, int64_t max_partial_rows);

}  // namespace flashinfer::host
