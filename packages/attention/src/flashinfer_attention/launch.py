"""The two kernels of attention on one device, the parameter structs that they take, and the buffer between them."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, List, NamedTuple, Optional, Tuple, Type, Union, cast

import torch

from flashinfer_attention.checks import Problem
from flashinfer_attention.variants import (
    CPU_THREADS_PER_MERGER,
    CPU_WORKERS_PER_THREAD,
    PACKAGE,
    AnyAttention,
    AnyVariant,
    choose,
    choose_merge,
)
from flashinfer_core import settings
from flashinfer_core.errors import MissingImageError, UnsupportedOptionError
from flashinfer_core.kernel import Kernel, load
from flashinfer_core.params import structure
from flashinfer_core.planner import useful_partial_rows

PARTIAL_ALIGNMENT = 256
# Keys of a piece where a plan is deterministic: its partial rows are then about 2 % of the bytes of its keys.
_FIXED_KEYS = 1024


class _Key(NamedTuple):
    """What `choose` depends on; `forced` is the target that an environment variable asks for."""

    dtype: str
    kv_dtype: str
    head_dim: int
    head_dim_vo: int
    max_rows: int
    where: Union[str, int]
    forced: str
    general: bool
    rotary: bool = False


class Kernels(NamedTuple):
    """The attention kernels of a problem and the merge kernel that combines their pieces."""

    key: _Key
    attention: Kernel  # for calls without options that change scores; a plan's tiles are its
    merge: Kernel
    workers: int
    tile_rows: int
    kv_tile: int
    tile_group: int  # rows of a tile come from this many heads of a query,
    tile_kv_heads: int  # and this many such tiles make up all heads

    def merge_workers(self, merges: int) -> int:
        """Return the workers that merge so many tiles, none where there is none.

        A CTA takes four rows at a time, or one of a decode tile, which has many pieces (merge.cuh). Threads wake
        slowly: in the time one merges what CPU_THREADS_PER_MERGER of them have cut.
        """
        if self.key.where == "cpu":
            return min(merges, -(-self.merge.max_workers // CPU_THREADS_PER_MERGER))
        return min(self.merge.max_workers, -(-merges * self.tile_rows // (4 if self.tile_rows > 16 else 1)))

    def attention_for(self, *, general: bool, rotary: bool) -> Kernel:
        """Return the attention kernel of a call, with or without options that change scores; loaded when first used."""
        return _attention(self.key._replace(general=True, rotary=rotary)) if general else self.attention

    @property
    def useful_partial_rows(self) -> int:
        """Count the partial rows that no plan exceeds."""
        return useful_partial_rows(self.tile_rows, self.workers)


def load_kernels(problem: Problem, max_rows: int) -> Kernels:
    """Load what `choose` picks for a longest request of `max_rows` packed rows."""
    where = "cpu" if problem.is_cpu else problem.device.index
    key = _Key(
        dtype=problem.element,
        kv_dtype=problem.kv_element,
        head_dim=problem.head_dim,
        head_dim_vo=problem.head_dim_vo,
        # Where `choose` turns from one tile to the next is a power of two, so few calls are told apart.
        max_rows=1 << max(max_rows - 1, 0).bit_length(),
        where=where,
        forced=settings.forced_target("cpu" if where == "cpu" else "cuda"),
        general=problem.window_left >= 0 or problem.has_mask,
    )
    attention, merge = _attention(key), _merge(key.dtype, where, key.forced)
    variant = cast(AnyAttention, attention.variant)
    tile_group, tile_kv_heads = problem.group, problem.num_kv_heads
    if variant.packs_all_heads:
        tile_group, tile_kv_heads = problem.num_qo_heads, 1
    workers = attention.max_workers * (CPU_WORKERS_PER_THREAD if where == "cpu" else 1)
    return Kernels(key, attention, merge, workers, variant.tile_rows, variant.kv_tile, tile_group, tile_kv_heads)


# `load` keeps the kernels; these keep which of them a problem gets, as `single` asks in every call.
@lru_cache(maxsize=None)
def _attention(key: _Key) -> Kernel:
    refused: List[UnsupportedOptionError] = []
    offered: List[str] = []

    def variant_for(target: str) -> Optional[AnyVariant]:
        if key.dtype == "bf16" and target.endswith("_75"):
            return None
        try:
            variant = choose(
                target,
                dtype=key.dtype,
                kv_dtype=key.kv_dtype,
                head_dim=key.head_dim,
                head_dim_vo=key.head_dim_vo,
                max_rows=key.max_rows,
                general=key.general,
                rotary=key.rotary,
            )
        except UnsupportedOptionError as error:  # an older target may hold less than the GPU's own
            refused.append(error)
            return None
        offered.append(target)
        return variant

    try:
        return load(variant_for, key.where)
    except MissingImageError:
        if refused and not offered:
            raise refused[0] from None
        raise


@lru_cache(maxsize=None)
def _merge(dtype: str, where: Union[str, int], forced: str) -> Kernel:
    del forced  # a kernel of another target is another kernel
    return load(lambda target: choose_merge(target, dtype=dtype), where)


@lru_cache(maxsize=None)
def structures() -> Tuple[Type[Any], Type[Any]]:
    """Return the ctypes classes of AttentionParams and MergeParams."""
    header = "attention/params.h"
    return structure(PACKAGE, header, "AttentionParams"), structure(PACKAGE, header, "MergeParams")


def copied(params: ctypes.Structure) -> Any:
    """Copy a struct, so that threads which run one plan fill in their own pointers."""
    return type(params).from_buffer_copy(params)


def stream_of(device: torch.device) -> int:
    """Return the raw handle of torch's current stream; 0 on CPUs."""
    # torch.cuda.current_stream makes an object of it, which takes longer than a launch.
    return 0 if device.type == "cpu" else int(torch._C._cuda_getCurrentRawStream(device.index))


class Partial(NamedTuple):
    """Addresses of the partial results in a buffer, and how many rows fit."""

    rows: int
    o: int
    lse: int


class OwnPartial(NamedTuple):
    """Partial results in a buffer that lives as long as this does."""

    buffer: torch.Tensor
    place: Partial


def fixed_piece(kv_tile: int) -> int:
    """Return the key tiles of a piece of a deterministic plan."""
    return max(1, _FIXED_KEYS // kv_tile)


def partial_bytes(rows: int, head_dim: int) -> int:
    """Count the bytes of a buffer for `rows` partial rows: head_dim values of o and one lse, all fp32."""
    return PARTIAL_ALIGNMENT + rows * 4 * (head_dim + 1)


def place_partial(buffer: torch.Tensor, head_dim: int, useful_rows: int) -> Partial:
    """Lay partial rows out in a uint8 buffer of any size and alignment, which may hold none."""
    start = buffer.data_ptr()
    aligned = -(-start // PARTIAL_ALIGNMENT) * PARTIAL_ALIGNMENT
    rows = max(0, start + buffer.numel() - aligned) // (4 * (head_dim + 1))
    rows = min(rows, useful_rows)
    return Partial(rows, aligned, aligned + 4 * head_dim * rows)


def allocate_partial(rows: int, head_dim: int, device: torch.device) -> OwnPartial:
    """Allocate a buffer for the partial results of one call."""
    buffer = torch.empty(partial_bytes(rows, head_dim), dtype=torch.uint8, device=device)
    return OwnPartial(buffer, place_partial(buffer, head_dim, rows))
