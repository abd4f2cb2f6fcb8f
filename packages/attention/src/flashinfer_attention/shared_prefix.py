"""One prefix that all requests share, beside a paged cache of what is their own: FlashInfer's two older wrappers.

Part of `flashinfer.cascade`. Both attend to each part and merge; MultiLevelCascadeAttentionWrapper does more.
"""

from __future__ import annotations

import functools
from typing import Callable, Optional, Tuple, cast

import torch

from flashinfer_attention.decode import BatchDecodeWithPagedKVCacheWrapper
from flashinfer_attention.prefill import BatchPrefillWithPagedKVCacheWrapper, single_prefill_with_kv_cache
from flashinfer_attention.states import merge_pair
from flashinfer_attention.wrapper import DataType
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import PagedCache, check_int32, check_tensor

_State = Tuple[torch.Tensor, torch.Tensor]


def _merged(shared: _State, own: _State) -> torch.Tensor:
    """Merge both parts into the first."""
    return merge_pair(*shared, *own, to_log2=1.0, out=shared[0], lse=shared[1])[0]


def _copy(name: str, lengths: torch.Tensor) -> torch.Tensor:
    check_int32(name, lengths)
    return lengths.clone()


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Attend from one new token of each request over a shared prefix and over the request's own pages.

    float_workspace_buffer: uint8 [any] on the device to run on; a small one costs splits, none is too small.
    kv_layout: NHD or HND, of the prefix and of the cache.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._own = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: Optional[torch.Tensor]
    ) -> None:
        """Replace both workspaces; plan again before the next run. See BatchDecodeWithPagedKVCacheWrapper."""
        self._own.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: DataType = "float16",
    ) -> None:
        """Plan the requests' own pages, a table as for BatchDecodeWithPagedKVCacheWrapper.plan.

        data_type: of q, prefix and cache. Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
        """
        self._own.plan(
            unique_kv_indptr,
            unique_kv_indices,
            unique_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=data_type,
        )

    def forward(
        self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, unique_kv_cache: PagedCache
    ) -> torch.Tensor:
        """Return o, as q: [batch, num_qo_heads, head_dim].

        k_shared, v_shared: [prefix_len, num_kv_heads, head_dim] (HND: [num_kv_heads, prefix_len, head_dim]).
        unique_kv_cache: as in BatchDecodeWithPagedKVCacheWrapper.run. Raises InvalidArgumentError, InvalidTypeError.
        """
        own = cast(_State, self._own.run(q, unique_kv_cache, return_lse=True))
        shared = single_prefill_with_kv_cache(q, k_shared, v_shared, kv_layout=self._kv_layout, return_lse=True)
        return _merged(cast(_State, shared), own)

    def end_forward(self) -> None:
        """Do nothing; older versions freed the plan here."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Attend from the new tokens of each request over a shared prefix and over the request's own pages.

    float_workspace_buffer, kv_layout: as in BatchDecodeWithSharedPrefixPagedKVCacheWrapper.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._own = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout
        self._plan_again: Optional[Callable[..., None]] = None
        self._planned: Optional[Tuple[torch.dtype, bool]] = None

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: Optional[torch.Tensor]
    ) -> None:
        """Replace both workspaces; plan again before the next run. See BatchPrefillWithPagedKVCacheWrapper."""
        self._own.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)
        self._planned = None

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Plan the requests' own pages, as BatchPrefillWithPagedKVCacheWrapper.plan does.

        Plans fp16 without a mask; `forward` plans copies of these lengths again for another dtype or a causal mask.
        Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
        """
        self._planned = None
        self._plan_again = functools.partial(
            self._own.plan,
            _copy("qo_indptr", qo_indptr),
            _copy("paged_kv_indptr", paged_kv_indptr),
            _copy("paged_kv_indices", paged_kv_indices),
            _copy("paged_kv_last_page_len", paged_kv_last_page_len),
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
        )
        self._plan_again()
        self._planned = torch.float16, False

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedCache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """Return o, as q: [qo_indptr[-1], num_qo_heads, head_dim].

        k_shared, v_shared, unique_kv_cache: as for the decode wrapper. causal: query i of a request sees its own keys
        up to i + kv_len - qo_len; the prefix is seen whole. Other options: as for single_prefill_with_kv_cache.
        Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
        """
        if self._planned is None or self._plan_again is None:
            raise InvalidArgumentError("there is no plan yet", remedy="call begin_forward() before forward()")
        check_tensor("q", q, (None, None, None))
        wanted = q.dtype, bool(causal)
        if wanted != self._planned:
            self._plan_again(causal=causal, q_data_type=q.dtype)
            self._planned = wanted
        own = self._own.forward_return_lse(
            q,
            unique_kv_cache,
            causal,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        shared = single_prefill_with_kv_cache(
            q,
            k_shared,
            v_shared,
            kv_layout=self._kv_layout,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            return_lse=True,
        )
        return _merged(cast(_State, shared), own)

    def end_forward(self) -> None:
        """Do nothing; older versions freed the plan here."""
