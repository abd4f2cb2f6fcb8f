"""Attention over ragged or paged keys and values: plan once from lengths, run as often as the lengths stay.

`attention` runs a plan's work list; `single` runs one request whose work is described by value, with no plan at all.
Both return an attention state (o, lse), which merges with others. FlashAttention-2 (arXiv 2307.08691) inside a tile,
Stream-K (arXiv 2301.03598) between tiles.
"""

from __future__ import annotations

import math
from typing import Any, Optional, Tuple, cast

import torch

from flashinfer_attention.checks import check_key_value, check_outputs, check_query, make_problem
from flashinfer_attention.launch import copied, load_kernels, partial_bytes, place_partial, stream_of, structures
from flashinfer_attention.plan import Plan, plan_attention
from flashinfer_attention.workspace import Workspace, workspace_bytes
from flashinfer_core import planner
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import KeyValue, key_value

__all__ = ["Plan", "Workspace", "attention", "plan_attention", "run", "run_single", "single", "workspace_bytes"]

Output = Tuple[torch.Tensor, Optional[torch.Tensor]]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: Plan,
    page_table: Optional[torch.Tensor] = None,
    sm_scale: Optional[float] = None,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of every request of `plan`.

    q: [tokens, num_qo_heads, head_dim]. k, v: ragged [rows, num_kv_heads, head_dim], or with a paged plan
    [pages, page_size, num_kv_heads, head_dim]; any strides with a contiguous last dimension, those of k and v may
    differ. page_table: int32 [entries] on the same device, page numbers of all requests; only for paged plans.
    sm_scale multiplies q k^T; None: 1/sqrt(head_dim). out: as q; lse: float32 [tokens, num_qo_heads] contiguous; both
    are allocated where None.
    Return (o as q, lse in natural logarithm). A row that sees no key has o = 0 and lse = -inf. Asynchronous on GPUs, on
    torch's current stream. Raises InvalidArgumentError, InvalidTypeError before anything is launched.
    """
    kv = key_value(k, v, paged=plan.page_size is not None)
    return _both(run(plan, q, kv, page_table, sm_scale=sm_scale, lse_scale=1.0, out=out, lse=lse, wants_lse=True))


def run(
    plan: Plan,
    q: torch.Tensor,
    kv: KeyValue,
    page_table: Optional[torch.Tensor],
    *,
    sm_scale: Optional[float],
    lse_scale: float,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    wants_lse: bool,
) -> Output:
    """Check, launch, and return (o, lse if given or wanted); the body of `attention` for callers with a KeyValue."""
    problem = plan.problem
    check_query(problem, q, None if plan.workspace.fixed else plan.tokens)
    check_key_value(problem, kv)
    plan.check_cache(kv, page_table)
    check_outputs(problem, q.shape[0], out, lse)
    if plan.workspace.fixed:
        plan.check_rows(q.shape[0])
    out, lse = _outputs(q, out, lse, wants_lse)
    if plan.is_empty:
        return out, lse

    stream = stream_of(problem.device)
    params = copied(plan.attention_params)
    params.page_table = 0 if page_table is None else page_table.data_ptr()
    _fill(params, q, kv, out, lse, sm_scale, lse_scale)
    plan.kernels.attention.launch(params, workers=plan.kernels.workers, stream=stream)
    if plan.merge_workers:
        params = copied(plan.merge_params)
        _fill_output(params, out, lse, lse_scale)
        plan.kernels.merge.launch(params, workers=plan.merge_workers, stream=stream)
    return out, lse


def single(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    sm_scale: Optional[float] = None,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of one request, without a plan.

    q: [q_len, num_qo_heads, head_dim]; k, v: [kv_len, num_kv_heads, head_dim]; any strides with a contiguous last
    dimension. causal: query i sees keys up to i + kv_len - q_len. sm_scale, out, lse and what is returned: as
    `attention`. Nothing is copied to the device, so a CUDA graph may capture even the first call of a process; partial
    results are allocated in the call, by torch. Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    kv = key_value(k, v, paged=False)
    return _both(run_single(q, kv, causal=causal, sm_scale=sm_scale, lse_scale=1.0, out=out, lse=lse, wants_lse=True))


def run_single(
    q: torch.Tensor,
    kv: KeyValue,
    *,
    causal: bool,
    sm_scale: Optional[float],
    lse_scale: float,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
    wants_lse: bool = False,
) -> Output:
    """Check, launch, and return (o, lse if given or wanted); the body of `single` for callers with a KeyValue."""
    if not isinstance(q, torch.Tensor) or q.dim() != 3:
        raise InvalidArgumentError("q must be a tensor of shape [q_len, num_qo_heads, head_dim]")
    q_len, num_qo_heads, head_dim = q.shape
    problem = make_problem(num_qo_heads, kv.heads, head_dim, causal, q.dtype, q.device)
    check_query(problem, q, q_len)
    check_key_value(problem, kv)
    check_outputs(problem, q_len, out, lse)
    out, lse = _outputs(q, out, lse, wants_lse)
    if q_len == 0:
        return out, lse

    kernels = load_kernels(problem, q_len * problem.group)
    work = planner.uniform_plan(
        q_len=q_len,
        kv_len=kv.pages,
        group=kernels.group,
        kv_heads=kernels.kv_heads,
        tile_rows=kernels.tile_rows,
        kv_tile=kernels.kv_tile,
        causal=problem.causal,
        num_workers=kernels.workers,
        max_partial_rows=kernels.useful_partial_rows,
    )
    stream = stream_of(problem.device)
    attention_type, merge_type = structures()
    params = attention_type(kv_heads=kv.heads, group=problem.group, head_dim=head_dim, page_size=1)
    params.causal = problem.causal
    uniform = (q_len, kv.pages, work.tiles, work.pieces, work.piece_len, int(problem.causal))
    params.uniform = uniform
    _fill(params, q, kv, out, lse, sm_scale, lse_scale)
    split = work.pieces > 1
    if split:
        # Lives until the end of this function: by then the launches have run (CPU) or are ordered in the stream (GPU).
        buffer = torch.empty(partial_bytes(work.partial_rows, head_dim), dtype=torch.uint8, device=q.device)
        partial = place_partial(buffer, head_dim, work.partial_rows)
        params.partial_o, params.partial_lse = partial.o, partial.lse
    kernels.attention.launch(params, workers=min(work.num_items, kernels.workers), stream=stream)
    if split:
        merge = merge_type(
            partial_o=partial.o,
            partial_lse=partial.lse,
            uniform=uniform,
            tile_rows=kernels.tile_rows,
            kv_heads=kernels.kv_heads,
            group=kernels.group,
            head_dim=head_dim,
        )
        _fill_output(merge, out, lse, lse_scale)
        kernels.merge.launch(merge, workers=kernels.merge_workers(kernels.kv_heads * work.tiles), stream=stream)
    return out, lse


def _outputs(q: torch.Tensor, out: Optional[torch.Tensor], lse: Optional[torch.Tensor], wants_lse: bool) -> Output:
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if lse is None and wants_lse:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return out, lse


def _both(output: Output) -> Tuple[torch.Tensor, torch.Tensor]:
    return cast(Tuple[torch.Tensor, torch.Tensor], output)


def _fill(
    params: Any,
    q: torch.Tensor,
    kv: KeyValue,
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    sm_scale: Optional[float],
    lse_scale: float,
) -> None:
    params.q = q.data_ptr()
    params.q_stride_token, params.q_stride_head, _ = q.stride()
    params.k, params.v = kv.k, kv.v
    params.k_stride_page, params.k_stride_token, params.k_stride_head = kv.k_strides
    params.v_stride_page, params.v_stride_token, params.v_stride_head = kv.v_strides
    params.sm_scale = 1.0 / math.sqrt(kv.head_dim) if sm_scale is None else sm_scale
    _fill_output(params, out, lse, lse_scale)


def _fill_output(params: Any, out: torch.Tensor, lse: Optional[torch.Tensor], lse_scale: float) -> None:
    params.o = out.data_ptr()
    params.o_stride_token, params.o_stride_head, _ = out.stride()
    params.lse = 0 if lse is None else lse.data_ptr()
    params.lse_scale = lse_scale
