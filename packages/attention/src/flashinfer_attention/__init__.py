"""Attention over ragged and paged KV caches.

`attention`, `plan_attention` and `single` are the native operator, `merge_*` merge what it returns; its lse is natural.
The names of FlashInfer are in `decode` and `prefill`; their lse is in base 2.
"""

from flashinfer_attention.attention import Plan, Workspace, attention, plan_attention, single, workspace_bytes
from flashinfer_attention.chunked import ChunkedAttention, chunked_attention
from flashinfer_attention.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    single_decode_with_kv_cache,
)
from flashinfer_attention.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from flashinfer_attention.prefix_tree import PrefixTree
from flashinfer_attention.recursive import CascadePlan, cascade_attention, plan_cascade
from flashinfer_attention.states import merge_ragged_states, merge_state, merge_state_in_place, merge_states
from flashinfer_attention.support import supports, why_not
from flashinfer_core.version import __version__

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "CascadePlan",
    "ChunkedAttention",
    "Plan",
    "PrefixTree",
    "Workspace",
    "__version__",
    "attention",
    "cascade_attention",
    "chunked_attention",
    "merge_ragged_states",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "plan_attention",
    "plan_cascade",
    "single",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "supports",
    "why_not",
    "workspace_bytes",
]
