// Attention on CPU threads: decode and prefill tiles behind one kernel.
//
// A tile of 64 rows holds the rows of all heads, so that decode reads whole pages in the order of memory; a larger one
// holds those of one KV head and is computed as a blocked matrix product.
#include "attention/cpu_decode.h"
#include "attention/cpu_prefill.h"
#if defined(__AMX_BF16__)
#include "attention/cpu_prefill_amx.h"
#endif

namespace flashinfer {
namespace attention {

template <class T, class TKv>
struct BlockedTile {
  using Type = PrefillTile<T, TKv>;
};

#if defined(__AMX_BF16__)
template <class TKv>
struct BlockedTile<bf16, TKv> {
  using Type = AmxTile<TKv>;
};
#endif

// TKv: of keys and values, as those of q or fp8.
template <class T, class TKv, int32_t kTileRows>
void attention(const AttentionParams& p, int32_t worker, int32_t num_workers) {
  constexpr int32_t kKvTile = kTileRows;  // as variants.py tells the planner
  if constexpr (kTileRows == DecodeTile<T, TKv>::kRows) {
    decode<T, TKv>(p, WorkerItems(p, p.kv_heads * p.group, 1, kTileRows, kKvTile, worker, num_workers));
  } else {
    using Tile = typename BlockedTile<T, TKv>::Type;
    static_assert(kTileRows == Tile::kRows, "tile_rows names the decode or the prefill tile");
    Tile tile(p);
    WorkItem item;
    for (WorkerItems items(p, p.group, p.kv_heads, kTileRows, kKvTile, worker, num_workers); items.next(item);)
      tile.run(item);
  }
}

}  // namespace attention
}  // namespace flashinfer
