"""FlashInfer's interface over the packages that implement it.

Names are imported when they are first used, so that `python -m flashinfer doctor` can say that torch is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from flashinfer_core.version import __version__

if TYPE_CHECKING:
    from flashinfer.cascade import (
        BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
        BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
        MultiLevelCascadeAttentionWrapper,
        merge_state,
        merge_state_in_place,
        merge_states,
    )
    from flashinfer.decode import (
        BatchDecodeWithPagedKVCacheWrapper,
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
        single_decode_with_kv_cache,
    )
    from flashinfer.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
    from flashinfer.prefill import (
        BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper,
        single_prefill_with_kv_cache,
        single_prefill_with_kv_cache_return_lse,
    )
    from flashinfer.quantization import packbits, segment_packbits

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "__version__",
    "append_paged_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "packbits",
    "segment_packbits",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

_MODULES = ("cascade", "decode", "page", "prefill", "quantization")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"flashinfer.{name}")
    if name in __all__:
        for module in map(importlib.import_module, (f"flashinfer.{module}" for module in _MODULES)):
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'flashinfer' has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__, *_MODULES})
