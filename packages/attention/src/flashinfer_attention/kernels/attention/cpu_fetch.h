// Fetch the next tile's keys and values into the L2 while this tile is computed.
//
// Rows of one head lie too far apart for the hardware to foresee, and crowd into few sets of the caches.
#pragma once

#include "attention/cpu_rows.h"

namespace flashinfer {
namespace attention {

template <class TKv, int32_t kKeys>
class NextKeys {
 public:
  KeyRows<kKeys> rows;

  // The keys from `begin` on, which may be none; `turns` is how often `fetch` will be called.
  void locate(const AttentionParams& p, const WorkItem& item, int32_t begin, int32_t turns) {
    rows.locate(p, item.kv_start, begin, begin < item.kv_end ? smaller(begin + kKeys, item.kv_end) : begin);
    k_ = static_cast<const TKv*>(p.k) + item.kv_head * p.k_stride_head;
    v_ = static_cast<const TKv*>(p.v) + item.kv_head * p.v_stride_head;
    dim_ = p.head_dim;
    dim_vo_ = p.head_dim_vo;
    each_ = ceil_div(rows.count, turns);
    fetched_ = 0;
  }

  void fetch() {
    constexpr int32_t kLine = 64 / sizeof(TKv);
    const int32_t end = smaller(fetched_ + each_, rows.count);
    for (; fetched_ < end; ++fetched_) {
      for (int32_t d = 0; d < dim_; d += kLine) __builtin_prefetch(k_ + rows.k[fetched_] + d, 0, 2);
      for (int32_t d = 0; d < dim_vo_; d += kLine) __builtin_prefetch(v_ + rows.v[fetched_] + d, 0, 2);
    }
  }

 private:
  const TKv* k_;
  const TKv* v_;
  int32_t dim_, dim_vo_;
  int32_t each_;     // keys of a turn
  int32_t fetched_;  // keys so far
};

}  // namespace attention
}  // namespace flashinfer
