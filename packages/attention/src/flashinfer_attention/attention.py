"""Attention over ragged or paged keys and values: plan once from lengths, run as often as the lengths stay.

`attention` runs a plan's work list; `single` runs one request whose work is described by value, with no plan at all.
Both return an attention state (o, lse), which merges with others. FlashAttention-2 (arXiv 2307.08691) inside a tile,
Stream-K (arXiv 2301.03598) between tiles.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple, cast

import torch

from flashinfer_attention.call import (
    Output,
    accept,
    baked_signature_of,
    fill_strides,
    keep,
    signature_of,
)
from flashinfer_attention.checks import (
    Problem,
    check_key_value,
    check_mask_bits,
    check_outputs,
    check_query,
    make_problem,
)
from flashinfer_attention.launch import Kernels, allocate_partial, load_kernels, stream_of, structures
from flashinfer_attention.ops import is_compiling, traced_attention, traced_single
from flashinfer_attention.options import NEUTRAL, Options, Scale
from flashinfer_attention.plan import Plan, plan_attention
from flashinfer_attention.support import FP8_ELEMENTS
from flashinfer_attention.workspace import Workspace, workspace_bytes
from flashinfer_core import planner
from flashinfer_core.tensors import KeyValue, check_tensor, key_value

__all__ = ["Plan", "Workspace", "attention", "plan_attention", "run_single", "single", "workspace_bytes"]

_NO_TENSORS = (None,) * 6


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: Plan,
    page_table: Optional[torch.Tensor] = None,
    sm_scale: Optional[float] = None,
    logits_soft_cap: float = 0.0,
    alibi: bool = False,
    rope: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    sinks: Optional[torch.Tensor] = None,
    q_scale: Optional[Scale] = None,
    k_scale: Optional[Scale] = None,
    v_scale: Optional[Scale] = None,
    mask: Optional[torch.Tensor] = None,
    mask_indptr: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of every request of `plan`.

    q: [tokens, num_qo_heads, head_dim]. k, v: ragged [rows, num_kv_heads, head_dim], or with a paged plan
    [pages, page_size, num_kv_heads, head_dim]; any strides with a contiguous last dimension, those of k and v may
    differ, and v may be head_dim_vo wide. page_table: int32 [entries] on the same device, page numbers of all requests,
    or [B or more, max_pages] where planned so; only for paged plans. Options, from sm_scale to mask_indptr: see
    `Options`; a mask if and only if the plan is for one. out: [tokens, num_qo_heads, head_dim_vo], dtype of q; lse:
    float32 [tokens, num_qo_heads] contiguous; both are allocated where None. Several threads may run one plan on a CPU;
    a GPU runs it on one stream at a time, because its runs share the workspace.
    Return (o, lse in natural logarithm). A row that sees no key has o = 0 and lse = -inf, or with sinks its head's.
    Asynchronous on GPUs, on torch's current stream. Raises InvalidArgumentError, InvalidTypeError,
    UnsupportedOptionError, WorkspaceError before anything is launched.
    """
    scalars = (sm_scale, logits_soft_cap, alibi, rope, rope_scale, rope_theta)
    tensors = (sinks, q_scale, k_scale, v_scale, mask, mask_indptr)
    if is_compiling():
        return traced_attention(q, k, v, plan.number, page_table, scalars, tensors, out, lse)
    return run(q, k, v, plan, page_table, scalars, tensors, out, lse)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    page_table: Optional[torch.Tensor],
    scalars: Tuple[Any, ...],
    tensors: Tuple[Any, ...],
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Run a call that the plan has accepted before, or check it first; scalars and tensors: `Options`, in its order."""
    call = signature = None
    try:
        signature = (
            (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride()),
            (v.dtype, v.device, signature_of(page_table), signature_of(out), signature_of(lse), scalars),
            None if tensors == _NO_TENSORS else tuple(map(baked_signature_of, tensors)),
        )
        call = plan.calls.get(signature)
    except (AttributeError, TypeError):  # what is no tensor or no number; `accept` names it
        pass
    if call is None:
        kv = key_value(k, v, paged=plan.page_size is not None)
        options = Options(*scalars, *tensors)
        call = accept(plan, q, kv, page_table, options, lse_scale=1.0, out=out, lse=lse, wants_lse=True)
        keep(plan.calls, signature, call)
    return _both(call.run(q, k.data_ptr(), v.data_ptr(), page_table, out, lse))


def single(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    sm_scale: Optional[float] = None,
    logits_soft_cap: float = 0.0,
    alibi: bool = False,
    rope: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    sinks: Optional[torch.Tensor] = None,
    q_scale: Optional[Scale] = None,
    k_scale: Optional[Scale] = None,
    v_scale: Optional[Scale] = None,
    mask: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of one request, without a plan.

    q: [q_len, num_qo_heads, head_dim]; k, v: [kv_len, num_kv_heads, head_dim], where v may be head_dim_vo wide; any
    strides with a contiguous last dimension. causal: query i sees keys up to i + kv_len - q_len. window_left: and from
    i + kv_len - q_len - window_left on; -1: no window. Options, from sm_scale to mask: see `Options`; a mask takes the
    place of causal. out, lse and what is returned: as `attention`. Nothing is copied to the device, so a CUDA graph may
    capture even the first call of a process; partial results are allocated in the call, by torch.
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    scalars = (sm_scale, logits_soft_cap, alibi, rope, rope_scale, rope_theta)
    tensors = (sinks, q_scale, k_scale, v_scale, mask)
    if is_compiling():
        return traced_single(q, k, v, causal, window_left, scalars, tensors, out, lse)
    kv = key_value(k, v, paged=False)
    options = Options(*scalars, *tensors)
    both = run_single(q, kv, options, causal=causal, window_left=window_left, out=out, lse=lse, wants_lse=True)
    return _both(both)


def run_single(
    q: torch.Tensor,
    kv: KeyValue,
    options: Options = NEUTRAL,
    *,
    causal: bool = False,
    window_left: int = -1,
    lse_scale: float = 1.0,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
    wants_lse: bool = False,
) -> Output:
    """Check, launch, and return (o, lse if given or wanted); the body of `single` for callers with a KeyValue."""
    check_tensor("q", q, (None, None, None))
    q_len, num_qo_heads, head_dim = q.shape
    problem = make_problem(
        num_qo_heads,
        kv.heads,
        head_dim,
        causal,
        q.dtype,
        q.device,
        head_dim_vo=kv.head_dim_vo,
        kv_dtype=kv.dtype if kv.dtype in FP8_ELEMENTS else None,  # any other than q's is a mistake
        window_left=window_left,
        has_mask=options.mask is not None,
    )
    check_query(problem, q, q_len)
    check_key_value(problem, kv)
    check_outputs(problem, q_len, out, lse)
    options.check(problem, 1)
    check_mask_bits(options.mask, q_len * kv.pages)
    out, lse = _outputs(problem, q, out, lse, wants_lse)
    if q_len > 0:
        _launch_uniform(problem, q, kv, options, out, lse, lse_scale)
    return out, lse


def _launch_uniform(
    problem: Problem,
    q: torch.Tensor,
    kv: KeyValue,
    options: Options,
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    lse_scale: float,
) -> None:
    """Launch the kernels on one request in equal pieces."""
    kernels = load_kernels(problem, q.shape[0] * problem.group)
    attention = kernels.attention_for(general=options.general, rotary=options.rope)
    work, uniform = _split(problem, q.shape[0], kv.pages, kernels)
    stream = stream_of(problem.device)
    attention_type, merge_type = structures()
    params = attention_type(kv_heads=kv.heads, group=problem.group, page_size=1, uniform=uniform)
    params.head_dim, params.head_dim_vo = problem.head_dim, problem.head_dim_vo
    params.causal, params.window_left = problem.causal, problem.window_left
    params.q, params.k, params.v = q.data_ptr(), kv.k, kv.v
    fill_strides(params, q, kv)
    _fill_output(params, out, lse, lse_scale)
    workers = min(work.num_items, kernels.workers)
    if work.pieces <= 1:
        options.fill(params, None, problem)
        attention.launch(params, workers=workers, stream=stream)
        return
    # Lives until the end of this function: by then the launches have run (CPU) or are ordered in the stream (GPU).
    partial = allocate_partial(work.partial_rows, problem.head_dim_vo, q.device)
    merge = merge_type(tile_rows=kernels.tile_rows, head_dim_vo=problem.head_dim_vo, uniform=uniform)
    merge.kv_heads, merge.group = kernels.tile_kv_heads, kernels.tile_group
    params.partial_o = merge.partial_o = partial.place.o
    params.partial_lse = merge.partial_lse = partial.place.lse
    options.fill(params, merge, problem)
    _fill_output(merge, out, lse, lse_scale)
    attention.launch(params, workers=workers, stream=stream)
    kernels.merge.launch(merge, workers=kernels.merge_workers(kernels.tile_kv_heads * work.tiles), stream=stream)


def _split(
    problem: Problem, q_len: int, kv_len: int, kernels: Kernels
) -> Tuple[planner.UniformPlan, Tuple[int, int, int, int, int, int, int]]:
    """Return the pieces of one request, and the fields of `UniformWork` that say so to the kernels."""
    shape = planner.Shape(
        kernels.tile_group,
        kernels.tile_kv_heads,
        kernels.tile_rows,
        kernels.kv_tile,
        problem.causal,
        kernels.workers,
        problem.window_left,
    )
    rows = kernels.useful_partial_rows
    work = planner.uniform_plan(shape, q_len=q_len, kv_len=kv_len, max_partial_rows=rows)
    return work, (q_len, kv_len, work.tiles, work.pieces, work.piece_len, int(problem.causal), problem.window_left)


def _outputs(
    problem: Problem, q: torch.Tensor, out: Optional[torch.Tensor], lse: Optional[torch.Tensor], wants_lse: bool
) -> Output:
    if out is None:
        shape = (q.shape[0], problem.num_qo_heads, problem.head_dim_vo)
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
    if lse is None and wants_lse:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return out, lse


def _both(output: Output) -> Tuple[torch.Tensor, torch.Tensor]:
    return cast(Tuple[torch.Tensor, torch.Tensor], output)


def _fill_output(params: Any, out: torch.Tensor, lse: Optional[torch.Tensor], lse_scale: float) -> None:
    params.o = out.data_ptr()
    params.o_stride_token, params.o_stride_head, _ = out.stride()
    params.lse = 0 if lse is None else lse.data_ptr()
    params.lse_scale = lse_scale
