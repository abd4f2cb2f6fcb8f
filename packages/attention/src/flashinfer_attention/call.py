"""A call that was accepted: checked once by what its tensors are, then launched with nothing but their addresses.

Whoever plans keeps its calls by signature, so the same call again (the next layer, the next step of a loop) costs a
look-up, the allocation of its outputs, and one launch.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch

from flashinfer_attention.checks import Problem, check_key_value, check_outputs, check_query
from flashinfer_attention.launch import allocate_partial, copied, stream_of
from flashinfer_attention.options import Options
from flashinfer_attention.plan import Plan
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.kernel import BoundLaunch
from flashinfer_core.tensors import KeyValue

Output = Tuple[torch.Tensor, Optional[torch.Tensor]]
Signature = Tuple[Any, ...]

# The addresses of a launch: for each, the steps (0: attention, 1: merge) and fields where it belongs.
_ATTENTION = (("q",), ("k",), ("v",), ("o",), ("lse",), ("page_table",), ("partial_o",), ("partial_lse",))
_MERGE = ((), (), (), ("o",), ("lse",), (), ("partial_o",), ("partial_lse",))
_SLOTS = {
    1: [[(0, field) for field in fields] for fields in _ATTENTION],
    2: [[(step, field) for step, fields in enumerate(both) for field in fields] for both in zip(_ATTENTION, _MERGE)],
}
_MOST_CALLS = 64


class Call:
    """What calls of one signature under a plan have in common. Several threads may run it at once on a CPU."""

    def __init__(
        self,
        plan: Plan,
        rows: int,
        bound: Optional[BoundLaunch],
        wants_lse: bool,
        check_table: Optional[Callable[[torch.Tensor], None]],
    ) -> None:
        problem = plan.problem
        self._plan = plan
        self._bound = bound
        self._device = problem.device
        self._is_cpu = problem.is_cpu
        self._new_out = allocator((rows, problem.num_qo_heads, problem.head_dim_vo), problem.dtype, problem.device)
        self._new_lse = None
        if wants_lse:
            self._new_lse = allocator((rows, problem.num_qo_heads), torch.float32, problem.device)
        self._check_table = check_table
        self._locks = problem.is_cpu and plan.merge_workers > 0

    def run(
        self,
        q: torch.Tensor,
        k: int,
        v: int,
        page_table: Optional[torch.Tensor],
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
    ) -> Output:
        """Launch with these tensors, and with keys and values at these addresses; return (o, lse if wanted)."""
        plan = self._plan
        plan.check_current(q.shape[0], page_table)
        if self._check_table is not None and page_table is not None:
            self._check_table(page_table)
        if out is None:
            out = self._new_out()
        if lse is None and self._new_lse is not None:
            lse = self._new_lse()
        if self._bound is None:
            return out, lse
        table = 0 if page_table is None else page_table.data_ptr()
        tensors = (q.data_ptr(), k, v, out.data_ptr(), 0 if lse is None else lse.data_ptr(), table)
        if self._locks:
            self._launch_alone(tensors)
        else:
            partial = plan.partial
            stream = 0 if self._is_cpu else stream_of(self._device)
            self._bound.launch((*tensors, partial.o, partial.lse), stream)
        return out, lse

    def _launch_alone(self, tensors: Tuple[int, ...]) -> None:
        """Launch on a CPU with the workspace's partial buffer, or with another one where a thread is using that."""
        plan, lock = self._plan, self._plan.workspace.partial_lock
        assert self._bound is not None
        if lock.acquire(blocking=False):
            try:
                self._bound.launch((*tensors, plan.partial.o, plan.partial.lse))
            finally:
                lock.release()
            return
        own = allocate_partial(plan.partial.rows, plan.problem.head_dim_vo, self._device)
        self._bound.launch((*tensors, own.place.o, own.place.lse))


def allocator(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a function that allocates a contiguous tensor in half of the time that torch.empty takes."""
    template = torch.empty(1, dtype=dtype, device=device).expand(tuple(shape))
    if torch.empty_like(template).is_contiguous():
        return functools.partial(torch.empty_like, template)
    return functools.partial(torch.empty, tuple(shape), dtype=dtype, device=device)


def accept(
    plan: Plan,
    q: torch.Tensor,
    kv: KeyValue,
    page_table: Optional[torch.Tensor],
    options: Options,
    *,
    lse_scale: float,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    wants_lse: bool,
    table_may_change: bool = True,
) -> Call:
    """Check a call and return what serves all of its signature, or raise.

    table_may_change: where page tables are checked, the caller's is before each launch, one of our own only here.
    """
    problem = plan.problem
    check_query(problem, q, None if plan.workspace.fixed else plan.tokens)
    if q.shape[0] < plan.tokens:
        raise InvalidArgumentError(f"q must have at least the {plan.tokens} planned rows, got {q.shape[0]}")
    check_key_value(problem, kv)
    plan.check_cache(kv, page_table)
    check_outputs(problem, q.shape[0], out, lse)
    options.check(problem, plan.lengths.num_requests)
    check_table = None
    if plan.checks_pages and plan.page_size is not None and table_may_change:
        check_table = functools.partial(plan.check_pages, kv.pages)
    bound = None if plan.is_empty else _bind(plan, problem, q, kv, options, lse_scale, out)
    return Call(plan, q.shape[0], bound, wants_lse, check_table)


def _bind(
    plan: Plan,
    problem: Problem,
    q: torch.Tensor,
    kv: KeyValue,
    options: Options,
    lse_scale: float,
    out: Optional[torch.Tensor],
) -> BoundLaunch:
    params = copied(plan.attention_params)
    merge = copied(plan.merge_params) if plan.merge_workers else None
    options.fill(params, merge, problem)
    fill_strides(params, q, kv)
    o_strides = (problem.num_qo_heads * problem.head_dim_vo, problem.head_dim_vo) if out is None else out.stride()[:2]
    for struct in (params,) if merge is None else (params, merge):
        struct.o_stride_token, struct.o_stride_head = o_strides
        struct.lse_scale = lse_scale
    steps = plan.steps(params, merge, general=options.general, rotary=options.rope)
    return BoundLaunch(steps, _SLOTS[len(steps)])


def keep(calls: Dict[Signature, Any], signature: Optional[Signature], call: Any) -> None:
    """Keep an accepted call by its signature; few are kept, so that nobody's memory grows."""
    if len(calls) >= _MOST_CALLS:
        calls.clear()
    if signature is not None:
        calls[signature] = call


def fill_strides(params: Any, q: torch.Tensor, kv: KeyValue) -> None:
    """Set the strides of q, k and v."""
    params.q_stride_token, params.q_stride_head, _ = q.stride()
    params.k_stride_page, params.k_stride_token, params.k_stride_head = kv.k_strides
    params.v_stride_page, params.v_stride_token, params.v_stride_head = kv.v_strides


def signature_of(tensor: Optional[torch.Tensor]) -> Any:
    """Return all that a check of a tensor reads, so everything but its contents."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def baked_signature_of(value: Any) -> Any:
    """Return what tells an option apart whose value or address goes into the parameters."""
    if value is None or not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0 and value.device.type == "cpu":
        return float(value)
    return value.data_ptr(), signature_of(value)
