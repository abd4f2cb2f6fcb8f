"""What FlashInfer's arguments mean: its spellings of options, as the native operator takes them."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, Union

import torch

from flashinfer_attention.options import Options, Scale
from flashinfer_attention.support import FP8_ELEMENTS, dtype_of
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError

LOG2_E = 1.4426950408889634  # a natural lse times this is one in base 2, which the compatible interface returns

DataType = Union[str, torch.dtype]

_BACKENDS = ("auto", "fa2", "fa3")
_POSITIONS = ("NONE", "ROPE_LLAMA", "ALIBI")


class Scalars(NamedTuple):
    """What `plan` fixes and `forward` sets anew; None stands for FlashInfer's default."""

    pos_encoding_mode: str = "NONE"
    sm_scale: Optional[float] = None
    logits_soft_cap: Optional[float] = None
    rope_scale: Optional[float] = None
    rope_theta: Optional[float] = None


def options_of(
    scalars: Scalars,
    *,
    q_scale: Optional[Scale] = None,
    k_scale: Optional[Scale] = None,
    v_scale: Optional[Scale] = None,
    mask: Optional[torch.Tensor] = None,
) -> Options:
    """Return the options of a call."""
    if scalars.pos_encoding_mode not in _POSITIONS:
        raise InvalidArgumentError(
            f"pos_encoding_mode must be one of {', '.join(_POSITIONS)}, got {scalars.pos_encoding_mode!r}"
        )
    return Options(
        sm_scale=scalars.sm_scale,
        logits_soft_cap=0.0 if scalars.logits_soft_cap is None else scalars.logits_soft_cap,
        alibi=scalars.pos_encoding_mode == "ALIBI",
        rope=scalars.pos_encoding_mode == "ROPE_LLAMA",
        rope_scale=1.0 if scalars.rope_scale is None else scalars.rope_scale,
        rope_theta=1e4 if scalars.rope_theta is None else scalars.rope_theta,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        mask=mask,
    )


def check_backend(backend: str) -> None:
    """Raise unless `backend` is one of FlashInfer's, which all name the same kernels here."""
    if backend not in _BACKENDS:
        raise InvalidArgumentError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")


def refuse_variants(name: str, arguments: object) -> None:
    """Raise UnsupportedOptionError for what only a custom variant, made from `jit_args`, takes."""
    if arguments:
        raise UnsupportedOptionError(name, arguments, "none: there are no custom variants yet")


def data_types(
    q_data_type: DataType, kv_data_type: Optional[DataType], data_type: Optional[DataType] = None
) -> Tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of q, and of keys and values.

    data_type names both at once, unless they have names of their own; fp8 names keys and values only.
    """
    if data_type is not None:
        both = dtype_of("data_type", data_type)
        if q_data_type == "float16" and both not in FP8_ELEMENTS:
            q_data_type = both
        kv_data_type = both if kv_data_type is None else kv_data_type
    dtype = dtype_of("q_data_type", q_data_type)
    kv_dtype = dtype if kv_data_type is None else dtype_of("kv_data_type", kv_data_type)
    if kv_dtype != dtype and kv_dtype not in FP8_ELEMENTS:
        raise UnsupportedOptionError("kv_data_type", kv_data_type, f"that of q, {dtype}, or fp8")
    return dtype, kv_dtype
