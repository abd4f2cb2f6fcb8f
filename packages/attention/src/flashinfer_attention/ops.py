"""Attention as torch operators, which is what torch.compile puts into a graph in the place of our Python.

Operators take tensors and numbers only, so plans and wrappers go in by number: the graph asks for what is planned when
it runs, and planning again compiles nothing again. Eager calls never come here.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Callable, Optional, Tuple, cast

import torch

from flashinfer_attention.options import Scale
from flashinfer_core.errors import InvalidArgumentError

_Both = Tuple[torch.Tensor, torch.Tensor]

# True while torch.compile traces; Dynamo knows the function and folds it.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling

_live: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def number_for(planned: object) -> int:
    """Return the number under which graphs find a plan or a wrapper for as long as it lives."""
    number = next(_numbers)
    _live[number] = planned
    return number


def _found(number: int) -> Any:
    planned = _live.get(number)
    if planned is None:
        raise InvalidArgumentError(
            "the plan or wrapper that a compiled graph was traced with is gone", remedy="keep it as long as the graph"
        )
    return planned


_SCALES = "Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, float? q_number, float? k_number, float? v_number"
_OPTIONS = (
    "float? sm_scale, float logits_soft_cap, bool alibi, bool rope, float rope_scale, float rope_theta, Tensor? sinks, "
    f"{_SCALES}, Tensor? mask"
)
_library: Any = cast(Any, torch.library.Library)("flashinfer", "FRAGMENT")
# Before torch 2.4 it had another name.
_register_fake: Any = getattr(torch.library, "register_fake", None) or getattr(torch.library, "impl_abstract", None)


def _define(schema: str, run: Callable[..., _Both], fake: Callable[..., _Both]) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    _register_fake(f"flashinfer::{name}", fake, lib=_library)


def _split(scale: Optional[Scale]) -> Tuple[Optional[torch.Tensor], Optional[float]]:
    return (scale, None) if isinstance(scale, torch.Tensor) else (None, scale)


def _scales(q_scale: Optional[Scale], k_scale: Optional[Scale], v_scale: Optional[Scale]) -> Tuple[Any, ...]:
    """Return scales as operators take them: tensors, then numbers."""
    tensors, numbers = zip(*map(_split, (q_scale, k_scale, v_scale)))
    return (*tensors, *numbers)


def _joined(scales: Tuple[Any, ...]) -> Tuple[Optional[Scale], ...]:
    return tuple(number if tensor is None else tensor for tensor, number in zip(scales[:3], scales[3:]))


def _stored(both: _Both, out: Optional[torch.Tensor], lse: Optional[torch.Tensor]) -> _Both:
    """Copy results to where the caller wants them: operators that only return are the easier ones to compile."""
    return both[0] if out is None else out.copy_(both[0]), both[1] if lse is None else lse.copy_(both[1])


def _shapes(q: torch.Tensor, v: torch.Tensor) -> _Both:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[-1])), q.new_empty(q.shape[:2], dtype=torch.float32)


def traced_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: int,
    page_table: Optional[torch.Tensor],
    scalars: Tuple[Any, ...],
    tensors: Tuple[Any, ...],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
) -> _Both:
    """Put `attention` into the graph that is being traced."""
    sinks, q_scale, k_scale, v_scale, mask, mask_indptr = tensors
    both = torch.ops.flashinfer.attention(
        q, k, v, plan, page_table, *scalars, sinks, *_scales(q_scale, k_scale, v_scale), mask, mask_indptr
    )
    return _stored(both, out, lse)


def _attention(q: Any, k: Any, v: Any, plan: int, page_table: Any, *options: Any) -> _Both:
    from flashinfer_attention.attention import run

    return run(q, k, v, _found(plan), page_table, options[:6], (options[6], *_joined(options[7:13]), *options[13:]))


def _attention_fake(q: Any, _k: Any, v: Any, *_: Any) -> _Both:
    return _shapes(q, v)


_define(
    f"attention(Tensor q, Tensor k, Tensor v, SymInt plan, Tensor? page_table, {_OPTIONS}, Tensor? mask_indptr)"
    " -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)


def traced_single(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window_left: int,
    scalars: Tuple[Any, ...],
    tensors: Tuple[Any, ...],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
) -> _Both:
    """Put `single` into the graph that is being traced."""
    sinks, q_scale, k_scale, v_scale, mask = tensors
    both = torch.ops.flashinfer.single(
        q, k, v, causal, window_left, *scalars, sinks, *_scales(q_scale, k_scale, v_scale), mask
    )
    return _stored(both, out, lse)


def _single(q: Any, k: Any, v: Any, causal: bool, window_left: int, *options: Any) -> _Both:
    from flashinfer_attention.attention import single

    names = ("sm_scale", "logits_soft_cap", "alibi", "rope", "rope_scale", "rope_theta", "sinks")
    scales = dict(zip(("q_scale", "k_scale", "v_scale"), _joined(options[7:13])))
    given: Any = {**dict(zip(names, options)), **scales, "mask": options[13]}
    return single(q, k, v, causal=causal, window_left=window_left, **given)


def _single_fake(q: Any, _k: Any, v: Any, *_: Any) -> _Both:
    return _shapes(q, v)


_define(
    f"single(Tensor q, Tensor k, Tensor v, bool causal, int window_left, {_OPTIONS}) -> (Tensor, Tensor)",
    _single,
    _single_fake,
)


def traced_run(
    wrapper: int,
    q: torch.Tensor,
    cache: Any,
    scales: Tuple[Any, Any, Any],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
) -> Any:
    """Put a wrapper's `run` into the graph that is being traced; cache: a pair, or one tensor that has both."""
    k, v = (cache[:, 0], cache[:, 1]) if isinstance(cache, torch.Tensor) else cache
    wants_lse = bool(return_lse) or lse is not None
    both = torch.ops.flashinfer.run(q, k, v, wrapper, *_scales(*scales), wants_lse)
    both = _stored(both, out, lse)
    return both if return_lse else both[0]


def _run(q: Any, k: Any, v: Any, wrapper: int, *rest: Any) -> _Both:
    o, lse = _found(wrapper)._run_traced(q, k, v, _joined(rest[:6]), rest[6])
    return o, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _run_fake(q: Any, _k: Any, v: Any, _wrapper: int, *rest: Any) -> _Both:
    o, lse = _shapes(q, v)
    return o, lse if rest[6] else cast(torch.Tensor, q.new_empty(0, dtype=torch.float32))


_define(
    f"run(Tensor q, Tensor k, Tensor v, SymInt wrapper, {_SCALES}, bool wants_lse) -> (Tensor, Tensor)",
    _run,
    _run_fake,
)
