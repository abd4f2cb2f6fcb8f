"""What every operator asks of its tensors, and the paged cache as kernels see it.

Checks are O(1) in the data and read nothing from a device. Only operator packages import this module: it needs torch.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from flashinfer_core import settings
from flashinfer_core.errors import InvalidArgumentError, InvalidLayoutError, InvalidTypeError

PagedCache = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
Strides = Tuple[int, int, int]

LAYOUTS = ("NHD", "HND")
_ALLOCATE = "allocate the cache that way; appending to a converted copy of it would be lost"


class KeyValue(NamedTuple):
    """Keys and values as kernels take them: addresses, and strides in elements of (page, token, head).

    Ragged rows are pages of one token: `pages` counts rows, `page_size` is 1, page and token stride are the same.
    """

    k: int
    v: int
    k_strides: Strides
    v_strides: Strides
    pages: int
    page_size: int
    heads: int
    head_dim: int
    head_dim_vo: int
    dtype: torch.dtype
    device: torch.device


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[Optional[int]],
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
    *,
    remedy: Optional[str] = None,
) -> None:
    """Raise unless `tensor` has this shape (None: any size), dtype, device and a contiguous last dimension.

    remedy: what to do instead of converting it, which mends only what is read.
    """
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    actual = tensor.shape
    if len(actual) != len(shape):
        raise InvalidArgumentError(f"{name} must have {len(shape)} dimensions, got shape {tuple(actual)}")
    for got, expected in zip(actual, shape):
        if expected is not None and got != expected:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InvalidArgumentError(f"{name} must have shape [{wanted}], got {tuple(actual)}")
    if dtype is not None and tensor.dtype != dtype:
        convert = f"convert it with .to({dtype})" if remedy is None else remedy
        raise InvalidTypeError(f"{name} must be {dtype}, got {tensor.dtype}", remedy=convert)
    if device is not None and tensor.device != device:
        raise InvalidArgumentError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.stride(-1) != 1 and tensor.numel() > 0 and actual[-1] > 1:
        raise InvalidArgumentError(
            f"the last dimension of {name} must be contiguous, got strides {tensor.stride()}",
            remedy="call .contiguous() on it" if remedy is None else remedy,
        )


def check_int32(name: str, tensor: torch.Tensor, size: Optional[int] = None) -> None:
    """Raise unless `tensor` is a contiguous int32 vector, of `size` elements where given."""
    check_tensor(name, tensor, (size,), torch.int32)


def check_integer(name: str, value: Any) -> int:
    """Return `value`, of any type of integer, as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidTypeError(f"{name} must be an integer, got {value!r}") from None


def check_readable(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the values of `tensor` can be copied to the host."""
    if tensor.device.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"{name} must be on a CPU or a CUDA device, got {tensor.device}")


def lacks_bfloat16(device: torch.device) -> bool:
    """Say whether the kernels for a CUDA device, or those that FLASHINFER_CUDA_TARGET forces, have no bfloat16."""
    if settings.forced_target("cuda").endswith("_75"):
        return True
    return torch.cuda.get_device_capability(device) < (8, 0)


def check_layout(kv_layout: str) -> None:
    """Raise unless `kv_layout` is NHD or HND."""
    if kv_layout not in LAYOUTS:
        raise InvalidLayoutError(f"kv_layout must be 'NHD' or 'HND', got {kv_layout!r}")


def key_value(k: torch.Tensor, v: torch.Tensor, *, paged: bool, kv_layout: str = "NHD") -> KeyValue:
    """View keys and values of any strides, whose last dimensions may differ.

    Shapes: [pages, page_size, kv_heads, head_dim] where `paged`, else [rows, kv_heads, head_dim]; with kv_layout HND
    the heads come before the tokens. Raises InvalidTypeError and InvalidArgumentError.
    """
    check_layout(kv_layout)
    check_tensor("k", k, (None,) * (4 if paged else 3))
    check_tensor("v", v, (*k.shape[:-1], None), k.dtype, k.device)
    shape, k_strides, v_strides = tuple(k.shape), k.stride(), v.stride()
    if kv_layout == "HND":
        shape, k_strides, v_strides = _tokens_first(shape), _tokens_first(k_strides), _tokens_first(v_strides)
    if not paged:
        shape, k_strides, v_strides = (shape[0], 1, *shape[1:]), _paged(k_strides), _paged(v_strides)
    return KeyValue(
        k.data_ptr(),
        v.data_ptr(),
        (k_strides[0], k_strides[1], k_strides[2]),
        (v_strides[0], v_strides[1], v_strides[2]),
        shape[0],
        shape[1],
        shape[2],
        shape[3],
        v.shape[-1],
        k.dtype,
        k.device,
    )


def _tokens_first(sizes: Tuple[int, ...]) -> Tuple[int, ...]:
    """Exchange heads and tokens, the second and third from the end."""
    return (*sizes[:-3], sizes[-2], sizes[-3], sizes[-1])


def _paged(strides: Tuple[int, ...]) -> Tuple[int, ...]:
    return (strides[0], *strides)


def paged_key_value(cache: PagedCache, kv_layout: str, *, alike: bool = True) -> KeyValue:
    """View a paged cache in any of its documented forms.

    A pair of 4-D tensors [pages, page_size, kv_heads, head_dim] (HND: [pages, kv_heads, page_size, head_dim]), or one
    5-D tensor that has keys and values along dimension 1. Where the page size is 1 its dimension may be left out.
    alike: keys and values must have the same strides and the same last dimension; else both may differ.
    Raises InvalidTypeError and InvalidArgumentError.
    """
    check_layout(kv_layout)
    if isinstance(cache, torch.Tensor):
        address, shape, strides, value_offset = _combined(cache)
        k, v, owner, v_strides, dim_vo = address, address + value_offset, cache, strides, shape[-1]
    else:
        owner, values = _pair(cache)
        shape, strides = _separate(owner, values, alike)
        k, v, v_strides, dim_vo = owner.data_ptr(), values.data_ptr(), values.stride(), values.shape[-1]
    if len(shape) == 3:  # pages of one token without their dimension
        shape, strides, v_strides = (shape[0], 1, *shape[1:]), _paged(strides), _paged(v_strides)
    elif kv_layout == "HND":
        shape, strides, v_strides = _tokens_first(shape), _tokens_first(strides), _tokens_first(v_strides)
    return KeyValue(
        k,
        v,
        (strides[0], strides[1], strides[2]),
        (v_strides[0], v_strides[1], v_strides[2]),
        shape[0],
        shape[1],
        shape[2],
        shape[3],
        dim_vo,
        owner.dtype,
        owner.device,
    )


def _combined(cache: torch.Tensor) -> Tuple[int, Tuple[int, ...], Tuple[int, ...], int]:
    """Split one tensor arithmetically: slicing it would cost more than a launch."""
    shape, strides = tuple(cache.shape), cache.stride()
    if len(shape) not in (4, 5) or shape[1] != 2:
        raise InvalidArgumentError(
            "a combined paged_kv_cache must have shape [pages, 2, page_size, kv_heads, head_dim] "
            f"(HND: [pages, 2, kv_heads, page_size, head_dim]), got {shape}"
        )
    check_tensor("paged_kv_cache", cache, shape, remedy=_ALLOCATE)
    return cache.data_ptr(), shape[:1] + shape[2:], strides[:1] + strides[2:], strides[1] * cache.element_size()


def _pair(cache: object) -> Tuple[Any, Any]:
    if isinstance(cache, (tuple, list)) and len(cache) == 2:
        return cache[0], cache[1]
    raise InvalidTypeError(f"paged_kv_cache must be a tensor or a pair (k_cache, v_cache), got {type(cache).__name__}")


def _separate(k: Any, v: Any, alike: bool) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    if not isinstance(k, torch.Tensor) or k.dim() not in (3, 4):
        got = tuple(k.shape) if isinstance(k, torch.Tensor) else type(k).__name__
        raise InvalidArgumentError(
            "k_cache must have shape [pages, page_size, kv_heads, head_dim] "
            f"(HND: [pages, kv_heads, page_size, head_dim]), got {got}"
        )
    check_tensor("k_cache", k, k.shape, remedy=_ALLOCATE)
    check_tensor("v_cache", v, k.shape if alike else (*k.shape[:-1], None), k.dtype, k.device, remedy=_ALLOCATE)
    strides = k.stride()
    if alike and v.stride() != strides and k.numel() > 0:
        raise InvalidArgumentError(
            f"k_cache and v_cache must have the same strides, got {strides} and {v.stride()}",
            remedy="allocate both alike, or as one tensor with keys and values along dimension 1",
        )
    return tuple(k.shape), strides
