"""What attention asks of its arguments, before anything is loaded or launched. O(1) in the data unless noted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from flashinfer_attention.variants import CPU_MAX_HEAD_DIM, CUDA_HEAD_DIMS
from flashinfer_core.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedDeviceError,
    UnsupportedOptionError,
)
from flashinfer_core.tensors import KeyValue, check_integer, check_tensor, lacks_bfloat16

# The kernels' sm_scale is a float32 that is not subnormal.
_LEAST_SCALE, _MOST_SCALE = 2.0**-126, 2.0**127

ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Problem:
    """What every call under one plan has in common."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Count the query heads that share a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def element(self) -> str:
        """Name the dtype as the kernels do."""
        return ELEMENTS[self.dtype]


def make_problem(
    num_qo_heads: int, num_kv_heads: int, head_dim: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Return the problem, or raise the typed error that says which part of it has no kernel."""
    num_qo_heads, num_kv_heads, head_dim = (
        check_integer("num_qo_heads", num_qo_heads),
        check_integer("num_kv_heads", num_kv_heads),
        check_integer("head_dim", head_dim),
    )
    check_heads(num_qo_heads, num_kv_heads)
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedDeviceError(f"there are no kernels for {device}", remedy="use a CPU or a CUDA device")
    if device.type == "cuda" and device.index is None:
        if not torch.cuda.is_available():
            raise UnsupportedDeviceError("torch finds no CUDA device", remedy="use device='cpu'")
        device = torch.device("cuda", torch.cuda.current_device())
    problem = Problem(num_qo_heads, num_kv_heads, head_dim, bool(causal), dtype, device)
    _check_dtype(problem)
    check_head_dim(problem)
    return problem


def check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Raise unless every KV head serves the same number of query heads."""
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise InvalidArgumentError(
            f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}"
        )


def _check_dtype(problem: Problem) -> None:
    dtype = problem.dtype
    if not isinstance(dtype, torch.dtype):
        raise InvalidTypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if problem.is_cpu:
        if dtype not in ELEMENTS:
            raise UnsupportedOptionError("dtype", dtype, "float32, float16 and bfloat16 on CPUs")
    elif dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedOptionError("dtype", dtype, "float16 and bfloat16 on GPUs")
    elif dtype == torch.bfloat16 and lacks_bfloat16(problem.device):
        raise UnsupportedOptionError("dtype", dtype, "float16 on GPUs older than sm_80, which lack bfloat16")


def check_head_dim(problem: Problem) -> None:
    """Raise UnsupportedOptionError that names the nearest head_dim which has a kernel."""
    dim = problem.head_dim
    if problem.is_cpu:
        if dim < 8 or dim % 8 or dim > CPU_MAX_HEAD_DIM:
            nearest = min(max(dim // 8 * 8, 8), CPU_MAX_HEAD_DIM)
            raise UnsupportedOptionError(
                "head_dim", dim, f"multiples of 8 up to {CPU_MAX_HEAD_DIM} on CPUs; the nearest is {nearest}"
            )
    elif dim not in CUDA_HEAD_DIMS:
        nearest = min(CUDA_HEAD_DIMS, key=lambda known: abs(known - dim))
        known = ", ".join(map(str, CUDA_HEAD_DIMS))
        raise UnsupportedOptionError("head_dim", dim, f"{known} on GPUs; the nearest is {nearest}")


def check_query(problem: Problem, q: torch.Tensor, tokens: Optional[int]) -> None:
    """Raise unless `q` is [tokens, num_qo_heads, head_dim] of the planned dtype on the planned device."""
    check_tensor("q", q, (tokens, problem.num_qo_heads, problem.head_dim), problem.dtype, problem.device)


def check_key_value(problem: Problem, kv: KeyValue) -> None:
    """Raise unless keys and values have the planned heads, head_dim, dtype and device."""
    if kv.heads != problem.num_kv_heads or kv.head_dim != problem.head_dim:
        raise InvalidArgumentError(
            f"k and v must have {problem.num_kv_heads} heads of {problem.head_dim} elements, "
            f"got {kv.heads} heads of {kv.head_dim}"
        )
    if kv.dtype != problem.dtype:
        raise InvalidTypeError(f"k and v must be {problem.dtype} as q is, got {kv.dtype}")
    if kv.device != problem.device:
        raise InvalidArgumentError(f"k and v must be on {problem.device}, got {kv.device}")


def check_outputs(problem: Problem, tokens: int, out: Optional[torch.Tensor], lse: Optional[torch.Tensor]) -> None:
    """Raise unless the buffers that were given fit: `out` as q, `lse` contiguous float32 [tokens, num_qo_heads]."""
    if out is not None:
        check_tensor("out", out, (tokens, problem.num_qo_heads, problem.head_dim), problem.dtype, problem.device)
    if lse is not None:
        check_tensor("lse", lse, (tokens, problem.num_qo_heads), torch.float32, problem.device)
        if not lse.is_contiguous():
            raise InvalidArgumentError(f"lse must be contiguous, got strides {lse.stride()}")


def check_sm_scale(sm_scale: Optional[float]) -> None:
    """Raise unless None or a positive number that float32 holds: the softmax takes the largest score before scaling."""
    if sm_scale is None:
        return
    try:
        fits = bool(_LEAST_SCALE <= sm_scale <= _MOST_SCALE)  # NaN is neither
    except (TypeError, ValueError, RuntimeError):
        raise InvalidTypeError(f"sm_scale must be a number or None, got {type(sm_scale).__name__}") from None
    if not fits:
        raise InvalidArgumentError(
            f"sm_scale must be finite and greater than 0, got {sm_scale}",
            remedy="negate q for a negative scale; None means 1/sqrt(head_dim)",
        )


def is_capturing(device: torch.device) -> bool:
    """Say whether torch's current stream is being captured in a CUDA graph."""
    return device.type != "cpu" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise where a CUDA graph is being captured: a graph would copy this plan's lengths again in every replay."""
    if is_capturing(device):
        raise InvalidArgumentError(
            "planning cannot be captured in a CUDA graph",
            remedy="plan before the capture; forward() plans too where it changes the mask",
        )


def check_page_table(
    page_table: torch.Tensor, kv_indptr: torch.Tensor, kv_len: torch.Tensor, page_size: int, pages: int
) -> None:
    """Raise InvalidArgumentError that names request and page where a used entry is not in [0, pages).

    `kv_indptr` int32 [B + 1] and `kv_len` int32 [B] lie on the host. Reads the whole table, so it waits for the device.
    """
    table = page_table.cpu()
    for request, length in enumerate(kv_len.tolist()):
        start = int(kv_indptr[request])
        used = table[start : start + -(-length // page_size)]
        outside = ((used < 0) | (used >= pages)).nonzero()
        if outside.numel():
            entry = int(outside[0])
            raise InvalidArgumentError(
                f"page_table names page {int(used[entry])} as page {entry} of request {request}, "
                f"but the cache has {pages} pages"
            )
