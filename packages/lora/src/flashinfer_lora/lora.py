"""Add the low-rank updates of many adapters to one batch: y[t] += scale[a] * (x[t] A[a]^T) B[a]^T, a = adapter of t."""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import torch

from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedOptionError
from flashinfer_core.kernel import load
from flashinfer_core.outputs import check_output, check_runs
from flashinfer_core.params import structure
from flashinfer_core.tensors import check_int32, check_tensor, lacks_bfloat16
from flashinfer_lora.variants import CPU_DTYPES, CUDA_DTYPES, choose

MAX_RANK = 512
_ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    *,
    a: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    scales: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Add each token's low-rank update to `y` in place and return `y`.

    Never synchronises with the device, and depends on no value of `indices`, so it can be captured in a CUDA graph.

    Args:
        y: [tokens, out_features], fp16 or bf16 (fp32 on CPUs); any row stride.
        x: [tokens, in_features], dtype and device of y; in_features is a multiple of 8.
        a: [adapters, rank, in_features], as x; rank is 1 to 512.
        b: [adapters, out_features, rank], as x.
        indices: [tokens], int32: the adapter of each token; -1, or any other number that names none, adds nothing.
        scales: [adapters], fp32: multiplies each adapter's update; None means 1.

    Raises InvalidArgumentError (shape, device, alignment, overlapping y), InvalidTypeError (dtype),
    UnsupportedOptionError (a dtype that the device lacks), UnsupportedDeviceError. Source: LoRA, Hu et al., 2021,
    arXiv:2106.09685; many adapters in one batch: Punica, Chen et al., 2023, arXiv:2310.18547.
    """
    _check_add_lora(y, x, a, b, indices, scales)
    tokens, adapters = x.shape[0], a.shape[0]
    if tokens == 0 or adapters == 0:
        return y
    on_cpu = x.device.type == "cpu"
    kernel = load(lambda target: choose(target, dtype=_ELEMENTS[x.dtype]), "cpu" if on_cpu else x.device.index)
    workers = min(tokens, kernel.max_workers * (4 if on_cpu else 1))
    stream = 0 if on_cpu else torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch(_params(y, x, a, b, indices, scales), workers=workers, stream=stream)
    return y


def _params(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    scales: Optional[torch.Tensor],
) -> ctypes.Structure:
    params: Any = structure("flashinfer_lora", "lora/params.h", "LoraParams")()
    params.x, params.y, params.a, params.b = x.data_ptr(), y.data_ptr(), a.data_ptr(), b.data_ptr()
    params.indices = indices.data_ptr()
    params.scales = scales.data_ptr() if scales is not None else None
    params.num_tokens = x.shape[0]
    params.x_stride_token, params.y_stride_token = x.stride(0), y.stride(0)
    params.a_stride_adapter, params.a_stride_rank = a.stride(0), a.stride(1)
    params.b_stride_adapter, params.b_stride_feature = b.stride(0), b.stride(1)
    params.adapters, params.rank, params.in_features = a.shape
    params.out_features = y.shape[1]
    return params  # type: ignore[no-any-return]


def _check_add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    scales: Optional[torch.Tensor],
) -> None:
    check_tensor("x", x, (None, None))
    check_runs("x", x.device)
    _check_dtype(x)
    tokens, in_features = x.shape
    check_output("y", y, (tokens, None), x.dtype, x.device)
    check_tensor("a", a, (None, None, in_features), x.dtype, x.device)
    adapters, rank, _ = a.shape
    check_tensor("b", b, (adapters, y.shape[1], rank), x.dtype, x.device)
    check_int32("indices", indices, tokens)
    check_tensor("indices", indices, (tokens,), device=x.device)
    if scales is not None:
        check_tensor("scales", scales, (adapters,), torch.float32, x.device)
    if not 1 <= rank <= MAX_RANK:
        raise InvalidArgumentError(f"the rank of a must be 1 to {MAX_RANK}, got {rank}")
    if in_features % 8 or in_features == 0:
        raise InvalidArgumentError(f"in_features must be a positive multiple of 8, got {in_features}")
    for name, tensor in (("x", x), ("a", a)):
        if tensor.data_ptr() % 16 or any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1]):
            raise InvalidArgumentError(
                f"rows of {name} must start at multiples of 16 bytes, got strides {tensor.stride()} "
                f"and an address {tensor.data_ptr() % 16} bytes past one",
                remedy="call .clone(memory_format=torch.contiguous_format) on it",
            )


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in _ELEMENTS:
        raise InvalidTypeError(f"x must be float16, bfloat16 or (on CPUs) float32, got {x.dtype}")
    supported = CPU_DTYPES if x.device.type == "cpu" else CUDA_DTYPES
    if _ELEMENTS[x.dtype] not in supported:
        raise UnsupportedOptionError("x.dtype", x.dtype, f"{', '.join(supported)} on {x.device.type}")
    if x.dtype == torch.bfloat16 and x.device.type == "cuda" and lacks_bfloat16(x.device):
        raise UnsupportedOptionError("x.dtype", x.dtype, "float16 on GPUs older than sm_80, which lack bfloat16")
