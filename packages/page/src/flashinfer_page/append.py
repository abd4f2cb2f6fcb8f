"""Write new keys and values into the paged cache."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any, Tuple, Type

import torch

from flashinfer_core import settings
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedOptionError
from flashinfer_core.kernel import load
from flashinfer_core.outputs import check_apart, check_runs
from flashinfer_core.page_table import check_targets, is_checked
from flashinfer_core.params import structure
from flashinfer_core.tensors import KeyValue, PagedCache, check_int32, check_tensor, paged_key_value
from flashinfer_page.variants import PACKAGE, choose

# Waking threads costs more than copying this much.
_BYTES_FOR_THREADS = 1 << 17


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write nnz new tokens to their places in the cache, in place.

    append_key, append_value: [nnz, num_kv_heads, head_dim], dtype of the cache, any strides with a contiguous last
    dimension. batch_indices, positions: int32 [nnz], request of each token and position there, as
    get_batch_indices_positions returns them; a negative position skips the token. paged_kv_cache: a pair of
    [pages, page_size, num_kv_heads, head_dim] (HND: [pages, num_kv_heads, page_size, head_dim]), or one tensor with
    keys and values along dimension 1. kv_indices: int32 [entries], pages of all requests; kv_indptr: int32 [B + 1],
    into kv_indices; kv_last_page_len: int32 [B], after the append (not read: positions say where tokens go). A token
    past its request's last page is skipped. Everything on one device; asynchronous on a GPU. Targets outside of the
    cache are refused on a CPU; with FLASHINFER_CHECK=1 also on a GPU, which waits for it, and so are skipped tokens.
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError, UnsupportedDeviceError.
    """
    cache = paged_key_value(paged_kv_cache, kv_layout)
    _check(append_key, append_value, batch_indices, positions, cache, kv_indices, kv_indptr, kv_last_page_len)
    _check_writable(paged_kv_cache)
    tokens = append_key.shape[0]
    if is_checked(cache.device):
        check_targets(
            batch_indices,
            positions,
            kv_indices,
            kv_indptr,
            page_size=cache.page_size,
            pages=cache.pages,
            strict=settings.enabled("FLASHINFER_CHECK"),
        )
    if tokens == 0 or cache.heads == 0 or cache.head_dim == 0:
        return
    size = append_key.element_size()
    key_strides, value_strides = _bytes(append_key.stride(), size), _bytes(append_value.stride(), size)
    cache_strides, row = _bytes(cache.k_strides, size), cache.head_dim * size
    params = _structure()(
        key=append_key.data_ptr(),
        value=append_value.data_ptr(),
        key_cache=cache.k,
        value_cache=cache.v,
        batch_indices=batch_indices.data_ptr(),
        positions=positions.data_ptr(),
        page_table=kv_indices.data_ptr(),
        page_indptr=kv_indptr.data_ptr(),
        num_tokens=tokens,
        key_stride_token=key_strides[0],
        key_stride_head=key_strides[1],
        value_stride_token=value_strides[0],
        value_stride_head=value_strides[1],
        cache_stride_page=cache_strides[0],
        cache_stride_token=cache_strides[1],
        cache_stride_head=cache_strides[2],
        kv_heads=cache.heads,
        row_bytes=row,
        page_size=cache.page_size,
    )
    if cache.device.type == "cpu":
        kernel = load(choose(cpu=True, alignment=1), "cpu")
        threads = 1 if tokens * cache.heads * row < _BYTES_FOR_THREADS else kernel.max_workers
        kernel.launch(params, workers=min(tokens, threads))
        return
    addresses = (params.key, params.value, cache.k, cache.v)
    alignment = _common_divisor((row, *addresses, *key_strides[:2], *value_strides[:2], *cache_strides))
    if alignment % 2:
        raise UnsupportedOptionError("paged_kv_cache", "rows of an odd number of bytes", "rows of an even number")
    kernel = load(choose(cpu=False, alignment=alignment), cache.device.index)
    stream = torch.cuda.current_stream(cache.device).cuda_stream
    kernel.launch(params, workers=min(tokens, kernel.max_workers), stream=stream)


@lru_cache(maxsize=None)
def _structure() -> Type[Any]:
    return structure(PACKAGE, "page/params.h", "AppendParams")


def _bytes(strides: Tuple[int, ...], size: int) -> Tuple[int, ...]:
    return tuple(stride * size for stride in strides)


def _common_divisor(values: Tuple[int, ...]) -> int:
    divisor = 16
    for value in values:
        divisor = gcd(divisor, value)
    return divisor


def _check_writable(cache: PagedCache) -> None:
    if isinstance(cache, torch.Tensor):
        check_apart("paged_kv_cache", cache)
    else:
        check_apart("k_cache", cache[0])
        check_apart("v_cache", cache[1])


def _check(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    cache: KeyValue,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    check_runs("paged_kv_cache", cache.device)
    if cache.page_size < 1:
        raise InvalidArgumentError("the pages of paged_kv_cache must have at least one token, got none")
    shape = (None, cache.heads, cache.head_dim)
    check_tensor("append_key", append_key, shape, device=cache.device)
    check_tensor("append_value", append_value, append_key.shape, append_key.dtype, cache.device)
    if append_key.dtype != cache.dtype:
        raise InvalidTypeError(f"append_key must be {cache.dtype} as the cache is, got {append_key.dtype}")
    for name, tensor, size in (
        ("batch_indices", batch_indices, append_key.shape[0]),
        ("positions", positions, append_key.shape[0]),
        ("kv_indices", kv_indices, None),
        ("kv_indptr", kv_indptr, None),
        ("kv_last_page_len", kv_last_page_len, kv_indptr.shape[0] - 1 if kv_indptr.dim() else None),
    ):
        check_int32(name, tensor, size)
        if tensor.device != cache.device:
            raise InvalidArgumentError(f"{name} must be on {cache.device}, got {tensor.device}")
