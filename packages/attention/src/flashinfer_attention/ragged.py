"""Prefill attention over keys and values that lie end to end, with FlashInfer's names, arguments and meaning.

Part of `flashinfer.prefill`, as the paged wrapper is.
"""

from __future__ import annotations

import functools
from typing import Any, List, Optional, Tuple, cast

import torch

from flashinfer_attention.call import signature_of
from flashinfer_attention.checks import make_problem
from flashinfer_attention.compat import DataType, Scalars, check_backend, data_types, options_of, refuse_variants
from flashinfer_attention.lengths import native_lengths
from flashinfer_attention.ops import is_compiling, traced_run
from flashinfer_attention.plan import plan_lengths
from flashinfer_attention.wrapper import Output, Wrapper, graph_buffer, with_mask
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import key_value


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Attend from the new tokens of each request over keys and values that lie end to end.

    float_workspace_buffer: uint8 [any] on the device to run on; a small one costs splits, none is too small.
    kv_layout: NHD or HND, of k and v. use_cuda_graph: as in BatchPrefillWithPagedKVCacheWrapper; needs qo_indptr_buf
    and kv_indptr_buf, int32 [B + 1], and for masks custom_mask_buf and mask_indptr_buf, as there. backend: auto, fa2
    and fa3 name the same kernels. Raises InvalidArgumentError, InvalidTypeError; UnsupportedOptionError for jit_args.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Optional[torch.Tensor] = None,
        kv_indptr_buf: Optional[torch.Tensor] = None,
        custom_mask_buf: Optional[torch.Tensor] = None,
        mask_indptr_buf: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[List[Any]] = None,
    ) -> None:
        check_backend(backend)
        refuse_variants("jit_args", jit_args)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._buffers: Optional[Tuple[torch.Tensor, torch.Tensor]] = None
        if use_cuda_graph:
            queries = graph_buffer("qo_indptr_buf", qo_indptr_buf, self.device)
            self._buffers = (queries, graph_buffer("kv_indptr_buf", kv_indptr_buf, self.device, queries.shape[0]))
            self._take_mask_buffers(custom_mask_buf, mask_indptr_buf, queries.shape[0])

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,  # noqa: ARG002 - accepted; sums are fp32
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DataType = "float16",
        kv_data_type: Optional[DataType] = None,
    ) -> None:
        """Plan a batch of B requests.

        qo_indptr, kv_indptr: int32 [B + 1], rows of q and of k and v of each request. Options: as in
        BatchPrefillWithPagedKVCacheWrapper.plan. Lengths on the host cost no synchronisation; lengths on a GPU are
        copied back, which waits.
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
        lengths = native_lengths(qo_indptr, kv_indptr, None, None)
        if self._buffers is not None and qo_indptr.shape != self._buffers[0].shape:
            raise InvalidArgumentError(
                f"the CUDA graph is for batches of {self._buffers[0].shape[0] - 1} requests, got {lengths.num_requests}"
            )
        mask = self._mask(lengths, custom_mask, packed_custom_mask)
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        options = with_mask(options_of(scalars), mask)
        options.check(problem, lengths.num_requests)
        plan = plan_lengths(problem, None, lengths, self._workspace)
        for buffer, indptr in zip(self._buffers or (), (qo_indptr, kv_indptr)):
            buffer.copy_(indptr, non_blocking=True)
        self._take(plan, options, mask)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
    ) -> Output:
        """Attend as planned; return o, or (o, lse) with return_lse.

        q: [qo_indptr[-1], num_qo_heads, head_dim]. k, v: [kv_indptr[-1] or more, num_kv_heads, head_dim] (HND:
        [num_kv_heads, rows, head_dim]), fp8 as it is. out: [rows of q, num_qo_heads, head_dim_vo]; lse: float32
        [rows of q, num_qo_heads], base 2.
        Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
        """
        if is_compiling():
            refuse_variants("*args", args)
            return cast(Output, traced_run(self._number, q, (k, v), (None, None, None), out, lse, return_lse))
        signature = found = None
        try:
            signature = (
                (q.shape, q.stride(), q.dtype, q.device, signature_of(k), signature_of(v), return_lse, args),
                None if out is None else signature_of(out),
                None if lse is None else signature_of(lse),
            )
            found = self._calls.get(signature)
        except (AttributeError, TypeError):  # what is no tensor; named below
            pass
        if found is not None:
            both = found[0].run(q, k.data_ptr(), v.data_ptr(), None, out, lse)
            return cast(Output, both if return_lse else both[0])
        refuse_variants("*args", args)
        kv = key_value(k, v, paged=False, kv_layout=self._kv_layout)
        return self._run(q, kv, None, self._options, signature, out, lse, return_lse)

    def _run_traced(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _scales: Any, wants_lse: bool
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Run from a compiled graph."""
        both = self.run(q, k, v, return_lse=wants_lse)
        return both if isinstance(both, tuple) else (both, None)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,  # noqa: ARG002 - accepted; sums are fp32
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """Set causal, window and scalars anew, keep a custom mask, and run; kept for old callers."""
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        o = self._forward((q, k, v), causal, window_left, scalars, return_lse=False)
        return cast(torch.Tensor, o)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,  # noqa: ARG002 - accepted; sums are fp32
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Set causal, window and scalars anew, keep a custom mask, and run with return_lse; kept for old callers."""
        scalars = Scalars(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        both = self._forward((q, k, v), causal, window_left, scalars, return_lse=True)
        return cast(Tuple[torch.Tensor, torch.Tensor], both)
