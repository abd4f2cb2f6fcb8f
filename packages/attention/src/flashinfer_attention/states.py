"""Merge attention states: (o, lse) of the same queries over different keys become those over all of them.

(o, lse) is a commutative monoid with unit (0, -inf): KV splits, chunks, cascade levels and ranks of a sequence-parallel
group all merge by it. Every lse here is natural. Accumulation is fp32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Optional, Tuple, Type, Union, cast

import torch

from flashinfer_attention.compat import LOG2_E
from flashinfer_attention.launch import stream_of
from flashinfer_attention.support import ELEMENTS
from flashinfer_attention.variants import PACKAGE, AnyVariant, States, choose_states
from flashinfer_core import settings
from flashinfer_core.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedOptionError,
)
from flashinfer_core.kernel import Kernel, load
from flashinfer_core.outputs import check_apart, check_output, check_runs
from flashinfer_core.params import structure
from flashinfer_core.tensors import check_int32, check_tensor, lacks_bfloat16

MAX_HEAD_DIM = 512
# Waking threads costs more than merging this much.
_BYTES_FOR_THREADS = 1 << 17
_RAGGED_STATES = 4  # rows have this many where nobody knows it, to choose a kernel

State = Tuple[torch.Tensor, torch.Tensor]


def merge_state(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
) -> State:
    """Merge two states of each row.

    o_a, o_b: [tokens, heads, head_dim], fp16, bf16 or fp32, o_a also fp32 where o_b has 16 bits; head_dim a multiple of
    8 up to 512; any strides with a contiguous last dimension. lse_a, lse_b: float32 [tokens, heads], natural logarithm,
    any strides. out: as o_a; lse: as lse_a; allocated where None, and may be o_a and lse_a themselves.
    A state with lse = -inf changes nothing, whatever its o holds. Return (o as o_a, lse). Asynchronous on GPUs.
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError, UnsupportedDeviceError.
    """
    return merge_pair(o_a, lse_a, o_b, lse_b, to_log2=LOG2_E, out=out, lse=lse)


def merge_state_in_place(
    o: torch.Tensor,
    lse: torch.Tensor,
    o_other: torch.Tensor,
    lse_other: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
) -> None:
    """Merge the state (o_other, lse_other) into (o, lse); see merge_state.

    mask: bool or uint8 [tokens], 0 leaves the token's state as it is; None: all are merged.
    """
    merge_pair(o, lse, o_other, lse_other, to_log2=LOG2_E, out=o, lse=lse, mask=mask)


def merge_states(
    o: torch.Tensor, lse: torch.Tensor, *, out: Optional[torch.Tensor] = None, lse_out: Optional[torch.Tensor] = None
) -> State:
    """Merge n states of each row, in one pass.

    o: [tokens, n, heads, head_dim]; lse: float32 [tokens, n, heads]; types, strides and what is raised as for
    merge_state. out: [tokens, heads, head_dim]; lse_out: float32 [tokens, heads]; allocated where None. Without states
    (n = 0) each row is the unit, (0, -inf). Return (o, lse).
    """
    return merge_stacked(o, lse, to_log2=LOG2_E, out=out, lse_out=lse_out)


def merge_ragged_states(
    o: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    *,
    out: Optional[torch.Tensor] = None,
    lse_out: Optional[torch.Tensor] = None,
) -> State:
    """Merge as many states as each row has, any number from 0.

    o: [states, heads, head_dim]; lse: float32 [states, heads]; row i of the result merges states indptr[i] to
    indptr[i + 1] - 1. indptr: int32 [tokens + 1] on the same device, not decreasing and within `states`; trusted, as
    its values are not read here. out, lse_out, types, what is raised and returned: as for merge_states.
    """
    _, heads, head_dim = _rows("o", o, "lse", lse)
    check_int32("indptr", indptr)
    if indptr.device != o.device or indptr.shape[0] == 0:
        raise InvalidArgumentError(
            f"indptr must be on {o.device} and have one element more than there are rows, "
            f"got {indptr.shape[0]} on {indptr.device}"
        )
    states = _View(o, lse, (0, o.stride(0), o.stride(1)), (0, lse.stride(0), lse.stride(1)))
    others = _View(o[1:], lse[1:], states.o_strides, states.lse_strides)
    shape = (indptr.shape[0] - 1, heads, head_dim)
    return _merge(states, others, _RAGGED_STATES, shape, LOG2_E, out, lse_out, indptr=indptr)


class RunningState:
    """The state of rows of q over the keys so far, in fp32: begins as the unit, (0, -inf).

    o: float32 [tokens, heads, head_dim]; lse: float32 [tokens, heads], natural. head_dim: a multiple of 8 up to 512.
    """

    def __init__(self, tokens: int, heads: int, head_dim: int, device: Union[torch.device, str]) -> None:
        self.o = torch.zeros((tokens, heads, head_dim), dtype=torch.float32, device=device)
        self.lse = torch.full((tokens, heads), float("-inf"), dtype=torch.float32, device=device)

    def add(self, o: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the state over further keys: o [tokens, heads, head_dim] of any of the dtypes, natural lse."""
        merge_pair(self.o, self.lse, o, lse, to_log2=LOG2_E, out=self.o, lse=self.lse)


def merge_pair(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    to_log2: float,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
    mask: Optional[torch.Tensor] = None,
) -> State:
    """Merge two states whose lse times `to_log2` is one in base 2; the body of merge_state and its in-place form."""
    shape = _rows("o_a", o_a, "lse_a", lse_a)
    check_tensor("o_b", o_b, shape, None if o_a.dtype == torch.float32 else o_a.dtype, o_a.device)
    _check_lse("lse_b", lse_b, shape[:2], o_a.device)
    if mask is not None:
        check_tensor("mask", mask, (shape[0],), None, o_a.device)
        if mask.dtype not in (torch.bool, torch.uint8):
            raise InvalidTypeError(f"mask must be bool or uint8, got {mask.dtype}")
    return _merge(_pair_view(o_a, lse_a), _pair_view(o_b, lse_b), 2, shape, to_log2, out, lse, mask=mask)


def merge_stacked(
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    to_log2: float,
    out: Optional[torch.Tensor] = None,
    lse_out: Optional[torch.Tensor] = None,
) -> State:
    """Merge [tokens, n, heads, head_dim] states whose lse times `to_log2` is one in base 2."""
    check_tensor("o", o, (None, None, None, None))
    tokens, count, heads, head_dim = o.shape
    check_head_dim(head_dim)
    _check_lse("lse", lse, (tokens, count, heads), o.device)
    first = _View(o, lse, o.stride()[:3], lse.stride())
    others = _View(o[:, 1:], lse[:, 1:], first.o_strides, first.lse_strides)
    return _merge(first, others, count, (tokens, heads, head_dim), to_log2, out, lse_out)


class _View(NamedTuple):
    """States as the kernels see them: strides in elements of (token, state, head)."""

    o: torch.Tensor
    lse: torch.Tensor
    o_strides: Tuple[int, ...]
    lse_strides: Tuple[int, ...]

    def fill(self, params: Any) -> None:
        """Write this into a StateRows."""
        params.o, params.lse = self.o.data_ptr(), self.lse.data_ptr()
        params.o_stride_token, params.o_stride_state, params.o_stride_head = self.o_strides
        params.lse_stride_token, params.lse_stride_state, params.lse_stride_head = self.lse_strides


def _pair_view(o: torch.Tensor, lse: torch.Tensor) -> _View:
    return _View(o, lse, (o.stride(0), 0, o.stride(1)), (lse.stride(0), 0, lse.stride(1)))


def _rows(o_name: str, o: torch.Tensor, lse_name: str, lse: torch.Tensor) -> Tuple[int, int, int]:
    """Check one state of each row; return its shape."""
    check_tensor(o_name, o, (None, None, None))
    tokens, heads, head_dim = o.shape
    check_head_dim(head_dim)
    _check_lse(lse_name, lse, (tokens, heads), o.device)
    return tokens, heads, head_dim


def check_head_dim(head_dim: int) -> None:
    """Raise unless there is a kernel for rows of so many columns."""
    if head_dim < 8 or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedOptionError("head_dim", head_dim, f"multiples of 8 up to {MAX_HEAD_DIM}")


def _check_lse(name: str, lse: torch.Tensor, shape: Tuple[int, ...], device: torch.device) -> None:
    """Raise unless `lse` is float32 of this shape; unlike o it may have any strides."""
    if not isinstance(lse, torch.Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(lse).__name__}")
    if lse.shape != shape or lse.device != device:
        raise InvalidArgumentError(
            f"{name} must have shape {list(shape)} on {device}, got {list(lse.shape)} on {lse.device}"
        )
    if lse.dtype != torch.float32:
        raise InvalidTypeError(f"{name} must be torch.float32, got {lse.dtype}")


def _merge(
    first: _View,
    others: _View,
    count: int,
    shape: Tuple[int, int, int],
    to_log2: float,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    *,
    indptr: Optional[torch.Tensor] = None,
    mask: Optional[torch.Tensor] = None,
) -> State:
    """Check the outputs, allocate those that are missing, launch; `_load` checks the types."""
    device, dtype = first.o.device, first.o.dtype
    check_runs("o", device)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        check_output("out", out, shape, dtype, device)
    if lse is None:
        lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
    else:
        _check_lse("lse", lse, shape[:2], device)
        check_apart("lse", lse)
    if out.numel() == 0:
        return out, lse
    params = _structure()(
        o=out.data_ptr(),
        lse=lse.data_ptr(),
        indptr=0 if indptr is None else indptr.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        o_stride_token=out.stride(0),
        o_stride_head=out.stride(1),
        lse_stride_token=lse.stride(0),
        lse_stride_head=lse.stride(1),
        tokens=shape[0],
        states=count,
        heads=shape[1],
        head_dim=shape[2],
        in_place=lse.data_ptr() in (first.lse.data_ptr(), others.lse.data_ptr()),
        to_log2=to_log2,
    )
    first.fill(params.first)
    others.fill(params.others)
    _launch(params, first, others, out)
    return out, lse


def _launch(params: Any, first: _View, others: _View, out: torch.Tensor) -> None:
    tokens, heads, head_dim = out.shape
    if out.device.type == "cpu":
        kernel = _load(_Key(others.o.dtype, out.dtype, "cpu"))
        busy = out.numel() * out.element_size() >= _BYTES_FOR_THREADS
        kernel.launch(params, workers=min(tokens * heads, kernel.max_workers) if busy else 1)
        return
    views = ((first.o, first.o_strides), (others.o, others.o_strides), (out, out.stride()[:2]))
    aligned = all(_is_aligned(*view) for view in views)
    kernel = _load(_Key(others.o.dtype, out.dtype, out.device.index, aligned, min(params.states, 8)))
    workers = -(-tokens * heads // cast(States, kernel.variant).rows_at_once(head_dim))
    kernel.launch(params, workers=min(workers, 2**31 - 1), stream=stream_of(out.device))


def _is_aligned(o: torch.Tensor, strides: Tuple[int, ...]) -> bool:
    size = o.element_size()
    return o.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides)


class _Key(NamedTuple):
    """What `choose_states` depends on."""

    dtype: torch.dtype
    sum_dtype: torch.dtype
    where: Union[str, int]
    aligned: bool = True
    states: int = 2


def _load(key: _Key) -> Kernel:
    return _load_for(key, settings.forced_target("cpu" if key.where == "cpu" else "cuda"))


@lru_cache(maxsize=None)
def _load_for(key: _Key, forced: str) -> Kernel:
    del forced  # a kernel of another target is another kernel
    for asked in (key.dtype, key.sum_dtype):
        if asked not in ELEMENTS:
            raise UnsupportedOptionError("dtype", asked, "float32, float16 and bfloat16")
        if asked == torch.bfloat16 and key.where != "cpu" and lacks_bfloat16(torch.device("cuda", int(key.where))):
            raise UnsupportedOptionError("dtype", asked, "float32 and float16 on GPUs older than sm_80")
    dtype, sum_dtype = ELEMENTS[key.dtype], ELEMENTS[key.sum_dtype]

    def states_for(target: str) -> Optional[AnyVariant]:
        if dtype == "bf16" and target.endswith("_75"):
            return None
        return choose_states(target, dtype=dtype, sum_dtype=sum_dtype, aligned=key.aligned, states=key.states)

    return load(states_for, key.where)


@lru_cache(maxsize=None)
def _structure() -> Type[Any]:
    return structure(PACKAGE, "attention/states_params.h", "StatesParams")
