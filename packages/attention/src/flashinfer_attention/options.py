"""What one call of attention sets beside its tensors: scales, and all that changes scores one by one.

Kernels take every option as a run-time field that is neutral by default, so one function fills the parameter structs
for every target and for calls with and without a plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Tuple, Union

import torch

from flashinfer_attention.checks import Problem, refuse
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError
from flashinfer_core.tensors import check_int32, check_tensor

Scale = Union[float, torch.Tensor]

# The kernels' scales are float32, and sm_scale is not subnormal.
_LEAST_SCALE, _MOST_SCALE = 2.0**-126, 2.0**127


@dataclass(frozen=True)
class Options:
    """The options of a call; the defaults change nothing.

    sm_scale: multiplies q k^T and is positive; None: 1/sqrt(head_dim). logits_soft_cap: c > 0 puts c tanh(x / c) in
    the place of a scaled logit x; 0: off. alibi: add slope(head) * (key - query position) before the cap. rope: rotate
    q and k by their positions (halves, as Llama does), divided by rope_scale, with base rope_theta. sinks: float32
    [num_qo_heads], a logit for each head that takes part in the sum and has no value. q_scale, k_scale, v_scale:
    multiply q, k and v; a number, or float32 on the device: of one element, or for k and v [num_kv_heads]. mask: uint8
    [any], bits [q_len, kv_len] of each request, lowest bit first, 1 is visible; mask_indptr: int32 [B + 1], at which
    bytes requests begin; None: one request.
    """

    sm_scale: Optional[float] = None
    logits_soft_cap: float = 0.0
    alibi: bool = False
    rope: bool = False
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    sinks: Optional[torch.Tensor] = None
    q_scale: Optional[Scale] = None
    k_scale: Optional[Scale] = None
    v_scale: Optional[Scale] = None
    mask: Optional[torch.Tensor] = None
    mask_indptr: Optional[torch.Tensor] = None

    @property
    def general(self) -> bool:
        """Say whether scores change one by one, for which there are kernels of their own; sinks and scales do not."""
        return bool(self.logits_soft_cap) or self.alibi or self.rope or self.mask is not None

    def check(self, problem: Problem, requests: int) -> None:
        """Raise unless every option has a meaning and, for this problem, a kernel."""
        _check_scales(self, problem)
        _check_floats(self)
        if self.sinks is not None:
            check_tensor("sinks", self.sinks, (problem.num_qo_heads,), torch.float32, problem.device)
        _check_mask(self, problem, requests)
        refuse(problem, tuple(self._names()))

    def _names(self) -> Iterator[str]:
        """Name what is set, as `support.OPTIONS` does; a mask is the problem's."""
        for name in ("logits_soft_cap", "alibi", "rope"):
            if getattr(self, name):
                yield name
        if self.sinks is not None:
            yield "sinks"
        if number_of(self.v_scale) not in (None, 1.0):
            yield "v_scale"
        if any(number_of(scale) is None for scale in (self.q_scale, self.k_scale, self.v_scale) if scale is not None):
            yield "scale_tensors"

    def fill(self, attention: Any, merge: Any, problem: Problem) -> None:
        """Set the fields of AttentionParams and, where there is one, MergeParams, neutral where an option is unset."""
        factor = 1.0 / math.sqrt(problem.head_dim) if self.sm_scale is None else self.sm_scale
        for number in (number_of(self.q_scale), number_of(self.k_scale)):
            factor *= 1.0 if number is None else number
        number = number_of(self.v_scale)
        attention.sm_scale = factor
        attention.v_factor = 1.0 if number is None else number
        attention.q_scale, _ = _pointer(self.q_scale)
        attention.k_scale, attention.k_scale_stride = _pointer(self.k_scale)
        attention.v_scale, attention.v_scale_stride = _pointer(self.v_scale)
        attention.logits_soft_cap = self.logits_soft_cap
        attention.alibi = self.alibi
        attention.rope = self.rope
        attention.rope_rcp_scale = 1.0 / self.rope_scale
        attention.rope_log2_theta = math.log2(self.rope_theta)
        attention.sinks = _address(self.sinks)
        attention.mask = _address(self.mask)
        attention.mask_indptr = _address(self.mask_indptr)
        if merge is not None:
            merge.sinks = attention.sinks


NEUTRAL = Options()


def number_of(scale: Optional[Scale]) -> Optional[float]:
    """Return a scale that is a number, or lies in host memory without dimensions, as a float; None for others.

    So a CPU tensor such as torch.tensor(1.0) serves a GPU too, and costs no synchronisation.
    """
    if scale is None:
        return None
    if isinstance(scale, torch.Tensor):
        return float(scale) if scale.dim() == 0 and scale.device.type == "cpu" else None
    if not hasattr(scale, "__float__"):  # float() reads text too
        raise TypeError(scale)
    return float(scale)


def _address(tensor: Optional[torch.Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointer(scale: Optional[Scale]) -> Tuple[int, int]:
    """Return the address and stride of a scale that kernels read; (0, 0) for none, and for a number."""
    if not isinstance(scale, torch.Tensor) or number_of(scale) is not None:
        return 0, 0
    return scale.data_ptr(), int(scale.numel() > 1)


def check_sm_scale(sm_scale: Optional[float]) -> None:
    """Raise unless None or a positive number that float32 holds: the softmax takes the largest score before scaling."""
    if sm_scale is None:
        return
    _check_number("sm_scale", sm_scale)
    if not _LEAST_SCALE <= sm_scale <= _MOST_SCALE:  # nor is NaN within
        raise InvalidArgumentError(
            f"sm_scale must be finite and greater than 0, got {sm_scale}",
            remedy="negate q for a negative scale; None means 1/sqrt(head_dim)",
        )


def _check_number(name: str, value: object) -> None:
    """Raise for text and for tensors, whose value is theirs to change."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__float__"):
        raise InvalidTypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_scales(options: Options, problem: Problem) -> None:
    check_sm_scale(options.sm_scale)
    product = 1.0 / math.sqrt(problem.head_dim) if options.sm_scale is None else options.sm_scale
    for name in ("q_scale", "k_scale", "v_scale"):
        scale = getattr(options, name)
        if isinstance(scale, torch.Tensor) and number_of(scale) is None:
            _check_scale_tensor(name, scale, problem)
            continue
        try:
            number = number_of(scale)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidTypeError(f"{name} must be a number, a tensor or None, got {type(scale).__name__}") from None
        if number is not None and not math.isfinite(number):
            raise InvalidArgumentError(f"{name} must be finite, got {number}")
        if number is not None and name != "v_scale":
            product *= number
    if not _LEAST_SCALE <= product <= _MOST_SCALE:
        raise InvalidArgumentError(
            f"sm_scale * q_scale * k_scale must be greater than 0 and fit float32, got {product}",
            remedy="negate q for a negative scale",
        )


def _check_scale_tensor(name: str, scale: torch.Tensor, problem: Problem) -> None:
    sizes = (1,) if name == "q_scale" else (1, problem.num_kv_heads)
    if scale.dim() > 1 or scale.numel() not in sizes:
        wanted = "one element" + ("" if name == "q_scale" else f", or [num_kv_heads] = [{problem.num_kv_heads}]")
        raise InvalidArgumentError(f"{name} must have {wanted}, got shape {tuple(scale.shape)}")
    check_tensor(name, scale.view(-1), (None,), torch.float32, problem.device)


def _check_floats(options: Options) -> None:
    _check_number("logits_soft_cap", options.logits_soft_cap)
    if not 0.0 <= options.logits_soft_cap <= _MOST_SCALE:
        raise InvalidArgumentError(f"logits_soft_cap must be finite and not negative, got {options.logits_soft_cap}")
    for name in ("rope_scale", "rope_theta"):
        value = getattr(options, name)
        _check_number(name, value)
        if not _LEAST_SCALE <= value <= _MOST_SCALE:
            raise InvalidArgumentError(f"{name} must be finite and greater than 0, got {value}")


def _check_mask(options: Options, problem: Problem, requests: int) -> None:
    if (options.mask is not None) != problem.has_mask:
        raise InvalidArgumentError(
            "the plan is for a mask, but mask is missing"
            if problem.has_mask
            else "a mask was given, but the plan is for none",
            remedy="plan with has_mask as attention() is called",
        )
    if options.mask is None:
        return
    check_tensor("mask", options.mask, (None,), torch.uint8, problem.device)
    if options.mask_indptr is not None:
        check_int32("mask_indptr", options.mask_indptr, requests + 1)
        if options.mask_indptr.device != problem.device:
            raise InvalidArgumentError(f"mask_indptr must be on {problem.device}, got {options.mask_indptr.device}")
    elif requests != 1:
        raise InvalidArgumentError(f"mask_indptr is needed: the batch has {requests} requests")
