"""Cascade attention and state merging with FlashInfer's names, arguments and meaning; every lse is in base 2.

A level attends from all queries to one part of their keys, shared by few or many; levels merge as states do. The native
forms, with natural lse, are in `states` and `recursive`.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, cast

import torch

from flashinfer_attention.prefill import BatchPrefillWithPagedKVCacheWrapper
from flashinfer_attention.recursive import split_workspace
from flashinfer_attention.shared_prefix import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)
from flashinfer_attention.states import merge_pair, merge_stacked
from flashinfer_attention.wrapper import DataType
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError
from flashinfer_core.tensors import PagedCache, check_integer

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of the same queries over two sets of keys; return (v, s) over both.

    v_a, v_b: [seq_len, num_heads, head_dim], fp16, bf16 or fp32; head_dim a multiple of 8 up to 512; any strides with a
    contiguous last dimension. s_a, s_b: float32 [seq_len, num_heads], base 2; -inf and FlashInfer's -5e4 both mean no
    key. Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    return merge_pair(v_a, s_a, v_b, s_b, to_log2=1.0)


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: Optional[torch.Tensor] = None
) -> None:
    """Merge (v_other, s_other) into (v, s); shapes, types and what is raised as for merge_state.

    mask: bool or uint8 [seq_len]; rows where it is 0 stay as they are. None: all rows are merged.
    """
    merge_pair(v, s, v_other, s_other, to_log2=1.0, out=v, lse=s, mask=mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Merge n states of each row; return (v [seq_len, num_heads, head_dim], s [seq_len, num_heads]).

    v: [seq_len, n, num_heads, head_dim]; s: float32 [seq_len, n, num_heads]; otherwise as merge_state.
    """
    return merge_stacked(v, s, to_log2=1.0)


class MultiLevelCascadeAttentionWrapper:
    """Attend over keys that groups of requests share, level by level, in one paged cache.

    num_levels: levels, the widest sharing first. float_workspace_buffer: uint8 [any] on the device to run on; a small
    one costs splits, none is too small. kv_layout: NHD or HND, of the cache. use_cuda_graph: plans keep to the buffers
    given, which then are needed, a list of num_levels of each: qo_indptr_buf_arr int32 [nodes + 1],
    paged_kv_indptr_buf_arr int32 [nodes + 1], paged_kv_indices_buf_arr int32 [most pages of the level],
    paged_kv_last_page_len_buf_arr int32 [nodes]. Raises InvalidArgumentError, InvalidTypeError.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Optional[List[torch.Tensor]] = None,
        paged_kv_indptr_buf_arr: Optional[List[torch.Tensor]] = None,
        paged_kv_indices_buf_arr: Optional[List[torch.Tensor]] = None,
        paged_kv_last_page_len_buf_arr: Optional[List[torch.Tensor]] = None,
    ) -> None:
        if check_integer("num_levels", num_levels) < 1:
            raise InvalidArgumentError(f"num_levels must be at least 1, got {num_levels}")
        arrays = {
            "qo_indptr_buf_arr": qo_indptr_buf_arr,
            "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
            "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
            "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
        }
        self._use_cuda_graph = bool(use_cuda_graph)
        buffers: List[Sequence[Any]] = [[None] * num_levels for _ in arrays]
        if use_cuda_graph:
            buffers = [_each(name, array, num_levels) for name, array in arrays.items()]
        workspaces = split_workspace(float_workspace_buffer, num_levels)
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout, use_cuda_graph, queries, indptr, indices, last)
            for workspace, queries, indptr, indices, last in zip(workspaces, *buffers)
        ]
        self._shape: Optional[Tuple[int, int]] = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Say whether plans keep to the buffers given, so that a captured graph replays with them."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: List[torch.Tensor]
    ) -> None:
        """Replace the workspaces; plan again before the next run.

        float_workspace_buffer: uint8 [any], for split results. int_workspace_buffers: for each level uint8 [any], for
        its work list. Raises InvalidTypeError, InvalidArgumentError.
        """
        lists = _each("int_workspace_buffers", int_workspace_buffers, len(self._levels))
        for level, workspace, work in zip(self._levels, split_workspace(float_workspace_buffer, len(lists)), lists):
            level.reset_workspace_buffer(workspace, work)
        self._shape = None

    def plan(
        self,
        qo_indptr_arr: List[torch.Tensor],
        paged_kv_indptr_arr: List[torch.Tensor],
        paged_kv_indices_arr: List[torch.Tensor],
        paged_kv_last_page_len: List[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DataType = "float16",
    ) -> None:
        """Plan every level; lists have an element for each.

        qo_indptr_arr: int32 [nodes + 1], rows of q that share each node of the level; every level covers the same rows.
        paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len: the nodes' page tables, as for
        BatchPrefillWithPagedKVCacheWrapper. A node may have no page, and no row. causal: in the last level query i of a
        node sees keys up to i + kv_len - qo_len; the levels before it are seen whole.
        Raises InvalidArgumentError, InvalidTypeError, WorkspaceError, and UnsupportedOptionError for a window or
        positions with more than one level, because a level does not know where its keys lie in a request.
        """
        self._check_positions(pos_encoding_mode, window_left)
        self._shape = None
        count = len(self._levels)
        names = ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr", "paged_kv_last_page_len")
        values = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        tables = [_each(name, value, count) for name, value in zip(names, values)]
        for i, (level, queries, indptr, indices, last) in enumerate(zip(self._levels, *tables)):
            level.plan(
                queries,
                indptr,
                indices,
                last,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=bool(causal) and i == count - 1,
                pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
                q_data_type=q_data_type,
            )
        rows = [level._planned().tokens for level in self._levels]
        if len(set(rows)) > 1:
            raise InvalidArgumentError(f"every level must cover the same rows of q, but qo_indptr_arr ends with {rows}")
        self._shape = num_qo_heads, head_dim

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: PagedCache) -> torch.Tensor:
        """Attend as planned; return o, as q.

        q: [qo_indptr_arr[...][-1], num_qo_heads, head_dim]; with use_cuda_graph it may have more rows, whose results
        mean nothing. paged_kv_cache: one cache for all levels, as in BatchDecodeWithPagedKVCacheWrapper.run.
        Raises InvalidArgumentError, InvalidTypeError.
        """
        if self._shape is None:
            raise InvalidArgumentError("there is no plan yet", remedy="call plan() before run()")
        if len(self._levels) == 1:
            return cast(torch.Tensor, self._levels[0].run(q, paged_kv_cache))
        count = len(self._levels)
        v = torch.empty((count, q.shape[0], *self._shape), dtype=q.dtype, device=q.device)
        s = torch.empty((count, q.shape[0], self._shape[0]), dtype=torch.float32, device=q.device)
        for i, level in enumerate(self._levels):
            level.run(q, paged_kv_cache, out=v[i], lse=s[i], return_lse=True)
        return merge_stacked(v.transpose(0, 1), s.transpose(0, 1), to_log2=1.0)[0]

    forward = run

    def end_forward(self) -> None:
        """Do nothing; older versions freed the plan here."""

    def _check_positions(self, pos_encoding_mode: str, window_left: int) -> None:
        if len(self._levels) == 1:
            return
        if pos_encoding_mode != "NONE":
            raise UnsupportedOptionError("pos_encoding_mode", pos_encoding_mode, "'NONE' with more than one level")
        if window_left >= 0:
            raise UnsupportedOptionError("window_left", window_left, "-1 (no window) with more than one level")


def _each(name: str, values: Optional[Sequence[Any]], count: int) -> Sequence[Any]:
    """Return a list that has one element for each level, or raise."""
    if values is None:
        raise InvalidArgumentError(f"use_cuda_graph=True needs {name}")
    if len(values) != count:
        raise InvalidArgumentError(f"{name} must have an element for each of {count} levels, got {len(values)}")
    return values
