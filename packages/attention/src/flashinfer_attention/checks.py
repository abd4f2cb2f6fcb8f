"""What attention asks of its arguments, before anything is loaded or launched. O(1) in the data unless noted."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from flashinfer_attention.support import KV_ELEMENTS, Asked, refusals
from flashinfer_core import settings
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedDeviceError
from flashinfer_core.outputs import check_output
from flashinfer_core.tensors import KeyValue, check_integer, check_tensor, lacks_bfloat16


@dataclass(frozen=True)
class Problem:
    """What every call under one plan has in common; `make_problem` checks it.

    causal is False where a mask takes its place. window_left: -1 means no window. deterministic: a request's bits do
    not depend on the batch around it.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_vo: int
    causal: bool
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    window_left: int = -1
    has_mask: bool = False
    deterministic: bool = False

    @property
    def group(self) -> int:
        """Count the query heads that share a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def element(self) -> str:
        """Name the dtype of q and o as the kernels do."""
        return KV_ELEMENTS[self.dtype]

    @property
    def kv_element(self) -> str:
        """Name the dtype of keys and values as the kernels do."""
        return KV_ELEMENTS[self.kv_dtype]


def make_problem(
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_dim_vo: Optional[int] = None,
    kv_dtype: Optional[torch.dtype] = None,
    window_left: int = -1,
    has_mask: bool = False,
    deterministic: bool = False,
) -> Problem:
    """Return the problem, or raise the typed error that says which part of it has no kernel."""
    device = _indexed(device)
    forced = "" if device.type == "cpu" else settings.forced_target("cuda")
    sizes = (num_qo_heads, num_kv_heads, head_dim, head_dim_vo, window_left)
    try:
        return _problem(*sizes, causal, dtype, kv_dtype, device, has_mask, deterministic, forced)
    except TypeError:  # what cannot be looked up is wrong, and is named there
        return _problem.__wrapped__(*sizes, causal, dtype, kv_dtype, device, has_mask, deterministic, forced)


# Engines plan the same problem in every step. `forced` is a part of what decides: some targets have no bfloat16.
@functools.lru_cache(maxsize=256, typed=True)
def _problem(
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: Optional[int],
    window_left: int,
    causal: bool,
    dtype: torch.dtype,
    kv_dtype: Optional[torch.dtype],
    device: torch.device,
    has_mask: bool,
    deterministic: bool,
    forced: str,
) -> Problem:
    del forced
    head_dim = check_integer("head_dim", head_dim)
    problem = Problem(
        num_qo_heads=check_integer("num_qo_heads", num_qo_heads),
        num_kv_heads=check_integer("num_kv_heads", num_kv_heads),
        head_dim=head_dim,
        head_dim_vo=head_dim if head_dim_vo is None else check_integer("head_dim_vo", head_dim_vo),
        causal=bool(causal) and not has_mask,
        dtype=dtype,
        kv_dtype=dtype if kv_dtype is None else kv_dtype,
        device=device,
        window_left=max(check_integer("window_left", window_left), -1),
        has_mask=has_mask,
        deterministic=bool(deterministic),
    )
    check_heads(problem.num_qo_heads, problem.num_kv_heads)
    for name, value in (("dtype", problem.dtype), ("kv_dtype", problem.kv_dtype)):
        if not isinstance(value, torch.dtype):
            raise InvalidTypeError(f"{name} must be a torch.dtype, got {value!r}")
    check_problem(problem)
    return problem


def check_problem(problem: Problem) -> None:
    """Raise UnsupportedOptionError for the first part of the problem that has no kernel."""
    asked = {
        "mask": problem.has_mask,
        "window_left": problem.window_left >= 0,
        "deterministic": problem.deterministic,
    }
    refuse(problem, [name for name, is_set in asked.items() if is_set])


def refuse(problem: Problem, options: Sequence[str]) -> None:
    """Raise UnsupportedOptionError for the first part of the problem, or of `options`, that has no kernel."""
    has_bfloat16 = problem.is_cpu or problem.dtype != torch.bfloat16 or not lacks_bfloat16(problem.device)
    asked = Asked(problem.dtype, problem.kv_dtype, problem.head_dim, problem.head_dim_vo, options, has_bfloat16)
    for refusal in refusals(problem.device.type, asked):
        raise refusal


def _indexed(device: torch.device) -> torch.device:
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedDeviceError(f"there are no kernels for {device}", remedy="use a CPU or a CUDA device")
    if str(device) == "cuda":  # without an index
        if not torch.cuda.is_available():
            raise UnsupportedDeviceError("torch finds no CUDA device", remedy="use device='cpu'")
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Raise unless every KV head serves the same number of query heads."""
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise InvalidArgumentError(
            f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}"
        )


def check_query(problem: Problem, q: torch.Tensor, tokens: Optional[int]) -> None:
    """Raise unless `q` is [tokens, num_qo_heads, head_dim] of the planned dtype on the planned device."""
    check_tensor("q", q, (tokens, problem.num_qo_heads, problem.head_dim), problem.dtype, problem.device)


def check_key_value(problem: Problem, kv: KeyValue) -> None:
    """Raise unless keys and values have the planned heads, head_dim, dtype and device."""
    if kv.heads != problem.num_kv_heads or kv.head_dim != problem.head_dim or kv.head_dim_vo != problem.head_dim_vo:
        raise InvalidArgumentError(
            f"k and v must have {_rows(problem.num_kv_heads, problem.head_dim, problem.head_dim_vo)}, "
            f"got {_rows(kv.heads, kv.head_dim, kv.head_dim_vo)}"
        )
    if kv.dtype != problem.kv_dtype:
        as_q = " as q is" if problem.kv_dtype == problem.dtype else ""
        raise InvalidTypeError(f"k and v must be {problem.kv_dtype}{as_q}, got {kv.dtype}")
    if kv.device != problem.device:
        raise InvalidArgumentError(f"k and v must be on {problem.device}, got {kv.device}")


def _rows(heads: int, head_dim: int, head_dim_vo: int) -> str:
    return f"{heads} heads of {head_dim}" + ("" if head_dim == head_dim_vo else f" and {head_dim_vo}") + " elements"


def check_outputs(problem: Problem, tokens: int, out: Optional[torch.Tensor], lse: Optional[torch.Tensor]) -> None:
    """Raise unless the buffers that were given fit, and no two of their elements share memory.

    out: [tokens, num_qo_heads, head_dim_vo] of q's dtype; lse: contiguous float32 [tokens, num_qo_heads].
    """
    if out is not None:
        check_output("out", out, (tokens, problem.num_qo_heads, problem.head_dim_vo), problem.dtype, problem.device)
    if lse is not None:
        shape = (tokens, problem.num_qo_heads)
        check_output("lse", lse, shape, torch.float32, problem.device, contiguous=True)


def check_mask_bits(mask: Optional[torch.Tensor], bits: int) -> None:
    """Raise where a mask, uint8 [any], has fewer bits than its one request needs."""
    if mask is not None and mask.shape[0] * 8 < bits:
        raise InvalidArgumentError(f"mask must have at least {-(-bits // 8)} bytes, got {mask.shape[0]}")


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
