"""Prefill attention with FlashInfer's names, arguments and meaning: any number of new tokens for each request.

The wrappers translate and call the native operator. What they return as lse is in base 2.
"""

from __future__ import annotations

import functools
from typing import Any, List, Optional, Tuple, cast

import torch

from flashinfer_attention.attention import run_single
from flashinfer_attention.checks import make_problem
from flashinfer_attention.compat import (
    LOG2_E,
    DataType,
    Scalars,
    check_backend,
    data_types,
    options_of,
    refuse_variants,
)
from flashinfer_attention.lengths import host_queries
from flashinfer_attention.masks import single_mask
from flashinfer_attention.options import Scale
from flashinfer_attention.ragged import BatchPrefillWithRaggedKVCacheWrapper
from flashinfer_attention.wrapper import Output, PagedWrapper, graph_buffer
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import PagedCache, check_tensor, key_value

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    custom_mask: Optional[torch.Tensor] = None,
    packed_custom_mask: Optional[torch.Tensor] = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,  # noqa: ARG001 - accepted; sums are fp32
    sm_scale: Optional[float] = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Output:
    """Attend from the new tokens of one request; return o, or (o, lse) with return_lse.

    q: [qo_len, num_qo_heads, head_dim]. k, v: [kv_len, num_kv_heads, head_dim], with kv_layout HND [num_kv_heads,
    kv_len, head_dim], of q's dtype or fp8; any strides with a contiguous last dimension; v and o may be of another
    width. custom_mask: bool [qo_len, kv_len], True is visible; packed_custom_mask: its bits, uint8
    [ceil(qo_len * kv_len / 8)], as packbits(mask.flatten(), "little") gives them; it wins, and either takes the place
    of causal. causal: query i sees keys up to i + kv_len - qo_len, and kv_len must be at least qo_len. window_left: and
    from i + kv_len - qo_len - window_left on, so window_left + 1 keys; -1: no window. pos_encoding_mode: NONE,
    ROPE_LLAMA (q and k are rotated here, with rope_scale, default 1, and rope_theta, default 1e4) or ALIBI.
    use_fp16_qk_reduction: accepted and without effect, products are always summed in fp32. logits_soft_cap: c > 0 puts
    c tanh(x / c) in the place of each scaled logit x. sm_scale: positive; None means 1/sqrt(head_dim). backend: auto,
    fa2 and fa3 name the same kernels. lse: float32 [qo_len, num_qo_heads], base 2; where no key is visible o = 0 and
    lse = -inf. Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    check_backend(backend)
    check_tensor("q", q, (None, None, None))
    kv = key_value(k, v, paged=False, kv_layout=kv_layout)
    mask = single_mask(custom_mask, packed_custom_mask, (q.shape[0], kv.pages))
    if causal and mask is None and kv.pages < q.shape[0]:
        raise InvalidArgumentError(
            f"with causal=True there must be at least as many keys as queries, got {kv.pages} and {q.shape[0]}",
            remedy="a batch wrapper gives o = 0 and lse = -inf for queries that see no key",
        )
    options = options_of(Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta), mask=mask)
    both = run_single(q, kv, options, causal=causal, window_left=window_left, lse_scale=LOG2_E, wants_lse=return_lse)
    return cast(Output, both if return_lse else both[0])


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attend from the new tokens of each request over a paged cache that holds their keys and values already.

    float_workspace_buffer: uint8 [any] on the device to run on; a small one costs splits, none is too small.
    kv_layout: NHD or HND, of the cache. use_cuda_graph: plans keep to the buffers given, so that a graph captured after
    a first plan replays with every later one that has no more tokens; needs qo_indptr_buf int32 [B + 1],
    paged_kv_indptr_buf int32 [B + 1], paged_kv_indices_buf int32 [most pages of a batch] and paged_kv_last_page_len_buf
    int32 [B], and for masks custom_mask_buf uint8 [most bytes of a batch] and mask_indptr_buf int32 [B + 1]. backend:
    auto, fa2 and fa3 name the same kernels.
    Raises InvalidArgumentError, InvalidTypeError; UnsupportedOptionError for jit_args.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Optional[torch.Tensor] = None,
        paged_kv_indptr_buf: Optional[torch.Tensor] = None,
        paged_kv_indices_buf: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buf: Optional[torch.Tensor] = None,
        custom_mask_buf: Optional[torch.Tensor] = None,
        mask_indptr_buf: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[List[Any]] = None,
    ) -> None:
        check_backend(backend)
        refuse_variants("jit_args", jit_args)
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
        )
        self._qo_indptr_buf: Optional[torch.Tensor] = None
        if self._buffers is not None:
            size = self._buffers[0].shape[0]
            self._qo_indptr_buf = graph_buffer("qo_indptr_buf", qo_indptr_buf, self.device, size)
            self._take_mask_buffers(custom_mask_buf, mask_indptr_buf, size)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,  # noqa: ARG002 - accepted; sums are fp32
        sm_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DataType = "float16",
        kv_data_type: Optional[DataType] = None,
        non_blocking: bool = True,
    ) -> None:
        """Plan a batch of B requests.

        qo_indptr: int32 [B + 1], rows of q of each request. paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len:
        the page table, as in BatchDecodeWithPagedKVCacheWrapper.plan, new tokens included. head_dim_vo: columns of v
        and o; None: head_dim_qk. custom_mask: bool, [qo_len, kv_len] of each request, row-major, one after another;
        packed_custom_mask: its bits, each request from a byte of its own, as segment_packbits(..., "little") gives
        them. A request may have no query or no key. Other options: as in single_prefill_with_kv_cache, and for dtypes
        and non_blocking as in BatchDecodeWithPagedKVCacheWrapper.plan. Lengths on the host cost no synchronisation;
        lengths on a GPU are copied back, which waits.
        Raises InvalidArgumentError, InvalidTypeError, WorkspaceError, and UnsupportedOptionError that names the option.
        """
        dtype, kv_dtype = data_types(q_data_type, kv_data_type)
        problem = make_problem(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            causal,
            dtype,
            self.device,
            head_dim_vo=head_dim_vo,
            kv_dtype=kv_dtype,
            window_left=window_left,
            has_mask=custom_mask is not None or packed_custom_mask is not None,
        )
        self._plan_pages(
            problem,
            page_size,
            host_queries(qo_indptr),
            (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            options_of(Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)),
            (custom_mask, packed_custom_mask),
            non_blocking,
        )
        if self._qo_indptr_buf is not None:
            self._qo_indptr_buf.copy_(qo_indptr, non_blocking=non_blocking)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        k_scale: Optional[Scale] = None,
        v_scale: Optional[Scale] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
    ) -> Output:
        """Attend as planned; return o, or (o, lse) with return_lse.

        q: [qo_indptr[-1], num_qo_heads, head_dim]; with use_cuda_graph it may have more rows, which are not touched.
        paged_kv_cache, k_scale, v_scale: as in BatchDecodeWithPagedKVCacheWrapper.run. out: [rows of q, num_qo_heads,
        head_dim_vo], dtype of q; lse: float32 [rows of q, num_qo_heads], base 2.
        Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
        """
        return self._run_pages(q, paged_kv_cache, args, (None, k_scale, v_scale), out, lse, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,  # noqa: ARG002 - accepted; sums are fp32
        k_scale: Optional[Scale] = None,
        v_scale: Optional[Scale] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """Set causal, window and scalars anew, keep a custom mask, and run; kept for old callers."""
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        o = self._forward((q, paged_kv_cache), causal, window_left, scalars, return_lse=False, **scales)
        return cast(torch.Tensor, o)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,  # noqa: ARG002 - accepted; sums are fp32
        k_scale: Optional[Scale] = None,
        v_scale: Optional[Scale] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Set causal, window and scalars anew, keep a custom mask, and run with return_lse; kept for old callers."""
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        both = self._forward((q, paged_kv_cache), causal, window_left, scalars, return_lse=True, **scales)
        return cast(Tuple[torch.Tensor, torch.Tensor], both)
