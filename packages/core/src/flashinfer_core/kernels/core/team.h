// Who makes a plan: one thread on the host, the threads of a CTA on a GPU. Each takes a range of whatever is dealt.
#pragma once

#include "core/types.h"

namespace flashinfer {

struct Range {
  int32_t begin;
  int32_t end;
};

// The part of [0, count) that falls to one thread of a team.
template <class Team>
FLASHINFER_HOST_DEVICE Range share_of(const Team& team, int32_t count) {
  const int64_t size = team.size(), index = team.index();
  return {int32_t(count * index / size), int32_t(count * (index + 1) / size)};
}

// A team has size(), index(), sync(), and two sums that all its threads call: exclusive(value), over the threads before
// this one, and total(value). What is written to memory before one of the three is seen by all threads after it.
struct OneThread {
  FLASHINFER_HOST_DEVICE static constexpr int32_t size() { return 1; }
  FLASHINFER_HOST_DEVICE static constexpr int32_t index() { return 0; }
  FLASHINFER_HOST_DEVICE static void sync() {}

  template <class T>
  FLASHINFER_HOST_DEVICE static T exclusive(const T&) {
    return T();
  }
  template <class T>
  FLASHINFER_HOST_DEVICE static T total(const T& value) {
    return value;
  }
};

}  // namespace flashinfer
