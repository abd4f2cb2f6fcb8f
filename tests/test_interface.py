"""The compatible interface: names, argument order and defaults, as FlashInfer 0.2.5 has them."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import flashinfer
import flashinfer.cascade
import flashinfer.decode
import flashinfer.page
import flashinfer.prefill
import flashinfer.quantization
from batches import Paged

SCALARS = "sm_scale=None, rope_scale=None, rope_theta=None"
MASKS = "custom_mask=None, packed_custom_mask=None, causal=False"
OLD = f"window_left=-1, logits_soft_cap=None, {SCALARS}"
RUN = "out=None, lse=None, return_lse=False"
SIGNATURES = {
    "single_decode_with_kv_cache": (
        "q, k, v, kv_layout='NHD', pos_encoding_mode='NONE', use_tensor_cores=False, "
        f"q_scale=None, k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, {SCALARS}"
    ),
    "single_prefill_with_kv_cache": (
        f"q, k, v, {MASKS}, kv_layout='NHD', pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, "
        "window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, return_lse=False, backend='auto'"
    ),
    "BatchDecodeWithPagedKVCacheWrapper": (
        "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, use_tensor_cores=False, "
        "paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, jit_args=None"
    ),
    "BatchDecodeWithPagedKVCacheWrapper.plan": (
        "self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, "
        "pos_encoding_mode='NONE', window_left=-1, logits_soft_cap=None, q_data_type='float16', kv_data_type=None, "
        f"data_type=None, {SCALARS}, non_blocking=True"
    ),
    "BatchDecodeWithPagedKVCacheWrapper.run": (
        f"self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, {RUN}"
    ),
    "BatchDecodeWithPagedKVCacheWrapper.forward": (
        f"self, q, paged_kv_cache, pos_encoding_mode='NONE', q_scale=None, k_scale=None, v_scale=None, {OLD}"
    ),
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": (
        "workspace_buffer, indptr_buffer, indices_buffer, last_page_len_buffer, kv_layout='NHD', use_tensor_cores=False"
    ),
    "BatchPrefillWithPagedKVCacheWrapper": (
        "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None, "
        "paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, "
        "backend='auto', jit_args=None"
    ),
    "BatchPrefillWithPagedKVCacheWrapper.plan": (
        "self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, "
        f"head_dim_qk, page_size, head_dim_vo=None, {MASKS}, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, "
        "sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, "
        "q_data_type='float16', kv_data_type=None, non_blocking=True"
    ),
    "BatchPrefillWithPagedKVCacheWrapper.run": (f"self, q, paged_kv_cache, *args, k_scale=None, v_scale=None, {RUN}"),
    "BatchPrefillWithPagedKVCacheWrapper.forward": (
        "self, q, paged_kv_cache, causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, "
        f"k_scale=None, v_scale=None, {OLD}"
    ),
    "BatchPrefillWithRaggedKVCacheWrapper": (
        "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf=None, kv_indptr_buf=None, "
        "custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None"
    ),
    "BatchPrefillWithRaggedKVCacheWrapper.plan": (
        f"self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, {MASKS}, "
        f"pos_encoding_mode='NONE', use_fp16_qk_reduction=False, {OLD}, q_data_type='float16', kv_data_type=None"
    ),
    "BatchPrefillWithRaggedKVCacheWrapper.run": f"self, q, k, v, *args, {RUN}",
    "BatchPrefillWithRaggedKVCacheWrapper.forward": (
        f"self, q, k, v, causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, {OLD}"
    ),
    "merge_state": "v_a, s_a, v_b, s_b",
    "merge_state_in_place": "v, s, v_other, s_other, mask=None",
    "merge_states": "v, s",
    "MultiLevelCascadeAttentionWrapper": (
        "num_levels, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf_arr=None, "
        "paged_kv_indptr_buf_arr=None, paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None"
    ),
    "MultiLevelCascadeAttentionWrapper.reset_workspace_buffer": "self, float_workspace_buffer, int_workspace_buffers",
    "MultiLevelCascadeAttentionWrapper.plan": (
        "self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, num_qo_heads, "
        "num_kv_heads, head_dim, page_size, causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, "
        "sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16'"
    ),
    "MultiLevelCascadeAttentionWrapper.run": "self, q, paged_kv_cache",
    "MultiLevelCascadeAttentionWrapper.forward": "self, q, paged_kv_cache",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": "float_workspace_buffer, kv_layout='NHD'",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper.begin_forward": (
        "self, unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, "
        "page_size, data_type='float16'"
    ),
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward": "self, q, k_shared, v_shared, unique_kv_cache",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": "float_workspace_buffer, kv_layout='NHD'",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper.begin_forward": (
        "self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, "
        "head_dim, page_size"
    ),
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper.forward": (
        "self, q, k_shared, v_shared, unique_kv_cache, causal=False, use_fp16_qk_reduction=False, sm_scale=None, "
        "rope_scale=None, rope_theta=None"
    ),
    "append_paged_kv_cache": (
        "append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, "
        "kv_layout='NHD'"
    ),
    "get_seq_lens": "kv_indptr, kv_last_page_len, page_size",
    "get_batch_indices_positions": "append_indptr, seq_lens, nnz",
    "packbits": "x, bitorder='big'",
    "segment_packbits": "x, indptr, bitorder='big'",
}
CASCADE_WRAPPERS = list(filter(lambda name: name.endswith("Wrapper"), vars(flashinfer.cascade)))
WRAPPERS = [name for name in SIGNATURES if name.endswith("Wrapper") and name not in CASCADE_WRAPPERS]


def named(name: str) -> Any:
    return functools.reduce(getattr, name.split("."), flashinfer)


def spelled(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return ", ".join(str(p) if p.default is p.empty else f"{p.name}={p.default!r}" for p in bare)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    assert spelled(named(name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", WRAPPERS)
def test_aliases(name: str) -> None:
    wrapper = named(name)
    assert wrapper.begin_forward is wrapper.plan
    assert inspect.getattr_static(wrapper, "run_return_lse").keywords == {"return_lse": True}
    assert spelled(wrapper.forward_return_lse) == spelled(wrapper.forward)
    assert spelled(wrapper.reset_workspace_buffer) == "self, float_workspace_buffer, int_workspace_buffer"
    assert spelled(wrapper.end_forward) == "self"


def test_aliases_of_cascade() -> None:
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper
    assert wrapper.begin_forward is wrapper.plan
    assert wrapper.forward is wrapper.run
    for name in CASCADE_WRAPPERS:
        if name != "MultiLevelCascadeAttentionWrapper":
            assert spelled(named(name).reset_workspace_buffer) == "self, float_workspace_buffer, int_workspace_buffer"
            assert spelled(named(name).end_forward) == "self"


def test_the_partial_that_returns_lse() -> None:
    partial = flashinfer.single_prefill_with_kv_cache_return_lse
    assert partial.func is flashinfer.single_prefill_with_kv_cache
    assert partial.keywords == {"return_lse": True}


@pytest.mark.parametrize("module", ["cascade", "decode", "prefill", "page", "quantization"])
def test_submodules_hold_what_the_top_level_does(module: str) -> None:
    names = named(module).__all__
    assert names
    for name in names:
        assert getattr(named(module), name) is getattr(flashinfer, name)


def test_every_public_name_has_a_docstring() -> None:
    for name in flashinfer.__all__:
        if not name.startswith("__") and not isinstance(named(name), functools.partial):
            assert inspect.getdoc(named(name)), name


def test_what_vllm_reads_of_wrappers() -> None:
    """Its backend asserts the scalars before each run, and hands the workspaces on."""
    batch = Paged([3, 1], [40, 20])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
    for causal, scale, cap in ((True, 0.125, None), (False, None, 0.0)):
        wrapper.plan(*tables, 4, 2, 64, 16, causal=causal, sm_scale=scale, logits_soft_cap=cap, window_left=-1)
        assert wrapper._causal is causal
        assert wrapper._window_left == -1
        assert wrapper._logits_soft_cap == (cap or 0.0)
        assert wrapper._sm_scale == scale
    wrapper.forward(batch.q, batch.cache, causal=True, sm_scale=0.5)
    assert wrapper._causal
    assert wrapper._sm_scale == 0.5
    for name in ("_float_workspace_buffer", "_int_workspace_buffer", "_pin_memory_int_workspace_buffer"):
        assert getattr(wrapper, name).dtype == torch.uint8
    assert wrapper._float_workspace_buffer.numel() == 1 << 20


def test_names_are_imported_when_they_are_used() -> None:
    """So that the doctor runs where torch is missing."""
    code = (
        "import sys, flashinfer; assert 'torch' not in sys.modules; flashinfer.decode; flashinfer.get_seq_lens; "
        "assert 'torch' in sys.modules; assert set(flashinfer.__all__) <= set(dir(flashinfer))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flashinfer.nothing
