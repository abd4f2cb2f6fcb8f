"""Options of the compatible interface: the values that change nothing, and the refusal of all others.

An option that is not there yet is never ignored.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Union

import torch

from flashinfer_attention.options import check_sm_scale
from flashinfer_attention.support import dtype_of
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError
from flashinfer_core.tensors import check_integer

LOG2_E = 1.4426950408889634  # a natural lse times this is one in base 2, which the compatible interface returns

_BACKENDS = ("auto", "fa2", "fa3")
_NEUTRAL = {
    "pos_encoding_mode": ("NONE",),
    "logits_soft_cap": (None, 0.0),
    "use_fp16_qk_reduction": (False,),
    "rope_scale": (None, 1.0),
    "rope_theta": (None, 1e4),
    "q_scale": (None, 1.0),
    "k_scale": (None, 1.0),
    "v_scale": (None, 1.0),
}


def check_options(
    *, window_left: int = -1, backend: str = "auto", sm_scale: Optional[float] = None, **options: Any
) -> None:
    """Raise UnsupportedOptionError for the first option that is set to more than its neutral value."""
    check_sm_scale(sm_scale)
    if check_integer("window_left", window_left) >= 0:
        raise UnsupportedOptionError("window_left", window_left, "-1 (no window)")
    if backend not in _BACKENDS:
        raise InvalidArgumentError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    for name, value in options.items():
        neutral = _NEUTRAL.get(name, (None,))
        # Tensors (masks) compare element by element, so identity comes first.
        if value is not None and (isinstance(value, torch.Tensor) or value not in neutral):
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise UnsupportedOptionError(name, what, " or ".join(map(repr, neutral)))


def old_options(
    pos_encoding_mode: str, use_fp16_qk_reduction: bool, rope_scale: Optional[float], rope_theta: Optional[float]
) -> Dict[str, Any]:
    """Name the options that most calls of FlashInfer take, for `check_options`."""
    return {
        "pos_encoding_mode": pos_encoding_mode,
        "use_fp16_qk_reduction": use_fp16_qk_reduction,
        "rope_scale": rope_scale,
        "rope_theta": rope_theta,
    }


def check_arguments(arguments: object) -> None:
    """Raise UnsupportedOptionError for the extra arguments that only a variant made from `jit_args` takes."""
    if arguments:
        raise UnsupportedOptionError("*args", arguments, "none: there are no custom variants yet")


def common_dtype(q_data_type: Union[str, torch.dtype], kv_data_type: Optional[Union[str, torch.dtype]]) -> torch.dtype:
    """Return the dtype of q, which keys and values must share."""
    dtype = dtype_of("q_data_type", q_data_type)
    if kv_data_type is not None and dtype_of("kv_data_type", kv_data_type) != dtype:
        raise UnsupportedOptionError("kv_data_type", kv_data_type, f"that of q, {dtype}")
    return dtype
