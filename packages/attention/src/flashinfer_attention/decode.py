"""Decode attention with FlashInfer's names, arguments and meaning: one new token for each request.

The wrappers translate and call the native operator. What they return as lse is in base 2.
"""

from __future__ import annotations

import functools
from typing import Any, List, Optional, Tuple, cast

import torch

from flashinfer_attention.attention import run_single
from flashinfer_attention.checks import make_problem
from flashinfer_attention.compat import LOG2_E, DataType, Scalars, data_types, options_of, refuse_variants
from flashinfer_attention.lengths import one_query_each
from flashinfer_attention.options import Scale
from flashinfer_attention.wrapper import Output, PagedWrapper
from flashinfer_core.tensors import PagedCache, check_tensor, key_value


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,  # noqa: ARG001 - FlashInfer's; one kernel serves both
    q_scale: Optional[Scale] = None,
    k_scale: Optional[Scale] = None,
    v_scale: Optional[Scale] = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    sm_scale: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
) -> torch.Tensor:
    """Attend from the one new token of one request; return o, shaped and typed as q.

    q: [num_qo_heads, head_dim]. k, v: [kv_len, num_kv_heads, head_dim], with kv_layout HND [num_kv_heads, kv_len,
    head_dim], of q's dtype or fp8; any strides with a contiguous last dimension; v and o may be of another width.
    pos_encoding_mode: NONE, ROPE_LLAMA (q and k are rotated here, with rope_scale, default 1, and rope_theta, default
    1e4) or ALIBI. use_tensor_cores: accepted and without effect, one kernel serves both. q_scale, k_scale, v_scale:
    multiply q, k and v: numbers, or float32 tensors of one element, for k and v also [num_kv_heads]. window_left: the
    token sees the last window_left + 1 keys; -1: all. logits_soft_cap: c > 0 puts c tanh(x / c) in the place of each
    scaled logit x. sm_scale: positive; None means 1/sqrt(head_dim). May be captured in a CUDA graph, even as a process'
    first call. Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
    options = options_of(scalars, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    check_tensor("q", q, (None, None))
    kv = key_value(k, v, paged=False, kv_layout=kv_layout)
    # The token sees every key, with or without a causal mask.
    o, _ = run_single(q.unsqueeze(0), kv, options, window_left=window_left, lse_scale=LOG2_E)
    return o.squeeze(0)


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Attend from one new token of each request over a paged cache.

    float_workspace_buffer: uint8 [any] on the device to run on; a small one costs splits, none is too small.
    kv_layout: NHD or HND, of the cache. use_cuda_graph: plans keep to the buffers given, so that a graph captured after
    a first plan replays with every later one; the batch size is then fixed by paged_kv_last_page_len_buffer.
    use_tensor_cores: accepted and without effect. paged_kv_indptr_buffer: int32 [B + 1]; paged_kv_indices_buffer: int32
    [most pages of a batch]; paged_kv_last_page_len_buffer: int32 [B].
    Raises InvalidArgumentError, InvalidTypeError; UnsupportedOptionError for jit_args.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Optional[torch.Tensor] = None,
        paged_kv_indices_buffer: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buffer: Optional[torch.Tensor] = None,
        jit_args: Optional[List[Any]] = None,
    ) -> None:
        refuse_variants("jit_args", jit_args)
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )
        self._use_tensor_cores = use_tensor_cores

    @property
    def use_tensor_cores(self) -> bool:
        """Return what was passed; one kernel serves both."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        q_data_type: Optional[DataType] = "float16",
        kv_data_type: Optional[DataType] = None,
        data_type: Optional[DataType] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
    ) -> None:
        """Plan a batch of B requests.

        indptr: int32 [B + 1], non-decreasing, into indices. indices: int32 [indptr[-1] or more], pages of all requests;
        copied. last_page_len: int32 [B], tokens in each request's last page, from 1 to page_size; not read where a
        request has no page. q_data_type, kv_data_type: a dtype or its name, the latter None (that of q) or fp8;
        data_type names both at once, unless they are set; fp8 there means keys and values. non_blocking: of the copies
        to the device. Other options: as in single_decode_with_kv_cache. Nothing waits for a device: lengths on the
        host are planned there, and those on the GPU there, where a batch without sense leaves outputs as they are.
        Raises InvalidArgumentError, InvalidTypeError, WorkspaceError, and UnsupportedOptionError that names the option.
        """
        dtype, kv_dtype = data_types("float16" if q_data_type is None else q_data_type, kv_data_type, data_type)
        problem = make_problem(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            False,
            dtype,
            self.device,
            kv_dtype=kv_dtype,
            window_left=window_left,
        )
        check_tensor("last_page_len", last_page_len, (None,), torch.int32)
        requests = last_page_len.shape[0]
        self._plan_pages(
            problem,
            page_size,
            one_query_each(requests),
            (indptr, indices, last_page_len),
            options_of(Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)),
            (None, None),
            non_blocking,
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: Optional[Scale] = None,
        k_scale: Optional[Scale] = None,
        v_scale: Optional[Scale] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
    ) -> Output:
        """Attend as planned; return o, or (o, lse) with return_lse.

        q: [B, num_qo_heads, head_dim]. paged_kv_cache: a pair of [pages, page_size, num_kv_heads, head_dim] (HND:
        [pages, num_kv_heads, page_size, head_dim]), or one tensor with keys and values along dimension 1; pages of one
        token may come without their dimension; the two of a pair may differ in strides. q_scale, k_scale, v_scale:
        multiply q, k and v: numbers, or float32 tensors of one element, for k and v also [num_kv_heads]. out: as q;
        lse: float32 [B, num_qo_heads], base 2; -inf (with o = 0) for a request without keys.
        Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
        """
        return self._run_pages(q, paged_kv_cache, args, (q_scale, k_scale, v_scale), out, lse, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Optional[Scale] = None,
        k_scale: Optional[Scale] = None,
        v_scale: Optional[Scale] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """Set the scalars anew and run; kept for old callers, see `run`."""
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        o = self._forward((q, paged_kv_cache), False, window_left, scalars, return_lse=False, **scales)
        return cast(torch.Tensor, o)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Optional[Scale] = None,
        k_scale: Optional[Scale] = None,
        v_scale: Optional[Scale] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Set the scalars anew and run with return_lse; kept for old callers, see `run`."""
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        both = self._forward((q, paged_kv_cache), False, window_left, scalars, return_lse=True, **scales)
        return cast(Tuple[torch.Tensor, torch.Tensor], both)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """Attend as BatchDecodeWithPagedKVCacheWrapper does with use_cuda_graph=True.

    workspace_buffer: its float_workspace_buffer; the other buffers as there, and required.
    """

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )
