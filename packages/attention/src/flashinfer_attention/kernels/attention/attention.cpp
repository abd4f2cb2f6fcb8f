// Attention on CPU threads: decode and prefill tiles behind one kernel.
//
// A tile of 64 rows holds the rows of all heads, so that decode reads whole pages in the order of memory; a tile of 96
// rows holds those of one KV head and is computed as a blocked matrix product.
#include "attention/cpu_decode.h"
#include "attention/cpu_prefill.h"
#if defined(__AMX_BF16__)
#include "attention/cpu_prefill_amx.h"
#endif

namespace flashinfer {
namespace attention {

template <class T>
struct BlockedTile {
  using Type = PrefillTile<T>;
};

#if defined(__AMX_BF16__)
template <>
struct BlockedTile<bf16> {
  using Type = AmxTile;
};
#endif

template <class T, int32_t kTileRows>
void attention(const AttentionParams& p, int32_t worker, int32_t num_workers) {
  constexpr int32_t kKvTile = kTileRows;  // as variants.py tells the planner
  if constexpr (kTileRows == DecodeTile<T>::kRows) {
    decode<T>(p, WorkerItems(p, p.kv_heads * p.group, 1, kTileRows, kKvTile, worker, num_workers));
  } else {
    using Tile = typename BlockedTile<T>::Type;
    static_assert(kTileRows == Tile::kRows, "tile_rows names the decode or the prefill tile");
    Tile tile;
    WorkItem item;
    for (WorkerItems items(p, p.group, p.kv_heads, kTileRows, kKvTile, worker, num_workers); items.next(item);)
      tile.run(p, item);
  }
}

}  // namespace attention
}  // namespace flashinfer
