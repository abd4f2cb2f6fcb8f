"""Which kernels exist, which of them ship for a target, and which one a problem gets.

A variant names one template instance. `choose` is pure: print what it returns to see what would run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, FrozenSet, NamedTuple, Optional, Tuple, Union

PACKAGE = "flashinfer_attention"

CPU_DTYPES = ("f32", "f16", "bf16")
CPU_MAX_HEAD_DIM = 256
CPU_DECODE_ROWS, CPU_PREFILL_ROWS = 64, 96
_CPU_KV_TILES = {CPU_DECODE_ROWS: 64, CPU_PREFILL_ROWS: 96}
# Packed rows of a KV head from which converting keys once for a blocked product pays.
CPU_MAX_DECODE_ROWS = 16
# On a CPU, workers beyond the threads let a thread that finished early take over from one that was interrupted.
CPU_WORKERS_PER_THREAD = 4

STATE_DTYPES = ("f32", "f16", "bf16")
STATES_THREADS = 256
STATES_AHEAD = 4  # states whose loads a thread has under way

CUDA_HEAD_DIMS = (64, 128, 256)
# Shared memory of a CTA in bytes. PTX also runs on the successors with the least: sm_86 and sm_120 have 99 KB.
SHARED_LIMITS: Dict[str, int] = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_90a": 227 << 10,
    "compute_75": 64 << 10,
    "compute_80": 99 << 10,
    "compute_90": 99 << 10,
}


class Support(NamedTuple):
    """What the kernels for one kind of device do. `options` are names of `support.OPTIONS`."""

    where: str
    dtypes: Tuple[str, ...]
    head_dims: Tuple[int, ...]
    options: FrozenSet[str]


SUPPORT = {
    "cpu": Support("CPUs", CPU_DTYPES, tuple(range(8, CPU_MAX_HEAD_DIM + 1, 8)), frozenset()),
    "cuda": Support("GPUs", ("f16", "bf16"), CUDA_HEAD_DIMS, frozenset()),
}


@dataclass(frozen=True)
class Attention:
    """One instance of `attention::attention` on a GPU. `dtype` is the element type in C++: f16, bf16."""

    dtype: str
    head_dim: int
    tile_rows: int
    kv_tile: int
    warps: int

    package = PACKAGE
    source = "attention/attention.cuh"
    packs_all_heads = False

    @property
    def name(self) -> str:
        return f"attention-{self.dtype}-d{self.head_dim}-q{self.tile_rows}"

    @property
    def expression(self) -> str:
        scope = "flashinfer::attention::"
        cache = f"{scope}KeyValue<flashinfer::{self.dtype}, {self.head_dim}, {self.head_dim}>"
        tile = f"{scope}Tile<{cache}, {self.tile_rows}, {self.kv_tile}, {self.warps}>"
        return f"{scope}attention<flashinfer::{self.dtype}, {tile}, {scope}Plain>"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Count the bytes of two stages of K and V, of the queries, and of what warps that share rows exchange."""
        shares_rows = self.tile_rows == 16 and self.warps > 1  # then the next item's queries are fetched ahead
        rows = self.tile_rows * (2 if shares_rows else 1) + 4 * self.kv_tile
        return 2 * self.head_dim * rows + (128 * self.warps if shares_rows else 0)

    @property
    def max_ctas(self) -> int:
        """Bound the CTAs that share an SM on any GPU: by threads, and by the largest shared memory (sm_90)."""
        return min(2048 // self.threads, (228 << 10) // (self.shared_bytes + 1024))


@dataclass(frozen=True)
class AttentionCpu:
    """One instance of `attention::attention` on a CPU. `dtype` is the element type in C++: f32, f16, bf16."""

    dtype: str
    tile_rows: int

    package = PACKAGE
    source = "attention/attention.cpp"
    threads = 1
    shared_bytes = 0

    @property
    def name(self) -> str:
        return f"attention-{self.dtype}-q{self.tile_rows}"

    @property
    def expression(self) -> str:
        return f"flashinfer::attention::attention<flashinfer::{self.dtype}, {self.tile_rows}>"

    @property
    def kv_tile(self) -> int:
        return _CPU_KV_TILES[self.tile_rows]

    @property
    def packs_all_heads(self) -> bool:
        """Say whether a tile's rows are those of all KV heads, so that whole pages are read in the order of memory."""
        return self.tile_rows == CPU_DECODE_ROWS


@dataclass(frozen=True)
class Merge:
    """One instance of `attention::merge`, on a GPU or a CPU."""

    dtype: str
    source: str

    package = PACKAGE
    shared_bytes = 0

    @property
    def name(self) -> str:
        return f"merge-{self.dtype}"

    @property
    def expression(self) -> str:
        return f"flashinfer::attention::merge<flashinfer::{self.dtype}>"

    @property
    def threads(self) -> int:
        return 1 if self.source.endswith(".cpp") else 128


@dataclass(frozen=True)
class States:
    """One instance of `attention::merge_states`: `dtype` of states, `sum_dtype` of the first one and the result.

    elements: columns of a GPU's thread, 16 bytes or one element; 0 on a CPU.
    """

    dtype: str
    sum_dtype: str
    elements: int

    package = PACKAGE
    shared_bytes = 0

    @property
    def source(self) -> str:
        return f"attention/states.{'cuh' if self.elements else 'cpp'}"

    @property
    def name(self) -> str:
        types = self.dtype if self.dtype == self.sum_dtype else f"{self.sum_dtype}-{self.dtype}"
        return f"states-{types}-{'element' if self.elements == 1 else 'vector'}" if self.elements else f"states-{types}"

    @property
    def expression(self) -> str:
        types = f"flashinfer::{self.sum_dtype}, flashinfer::{self.dtype}"
        sizes = f", {self.elements}, {STATES_AHEAD}" if self.elements else ""
        return f"flashinfer::attention::merge_states<{types}{sizes}>"

    @property
    def threads(self) -> int:
        return STATES_THREADS if self.elements else 1


AnyAttention = Union[Attention, AttentionCpu]
AnyVariant = Union[Attention, AttentionCpu, Merge, States]


def choose(
    target: str,
    *,
    dtype: str,
    kv_dtype: Optional[str] = None,
    head_dim: int,
    head_dim_vo: Optional[int] = None,
    max_rows: int,
    general: bool = False,
) -> AnyAttention:
    """Choose the attention kernel for a batch whose longest request has `max_rows` packed rows (queries x group).

    Few rows mean decoding, which memory bandwidth bounds: a small tile leaves no row idle. kv_dtype, head_dim_vo: None
    means those of q. general: the kernel must know what changes scores one by one (mask, soft cap, ALiBi, RoPE); plans
    are made for the kernel that need not, so both have the same tile_rows, and the general one a kv_tile that divides
    the other's. Pure; nothing is loaded.
    """
    del kv_dtype, head_dim_vo, general  # those of q, and the one kernel: `SUPPORT` has no more yet
    if target not in SHARED_LIMITS:
        return AttentionCpu(dtype, CPU_DECODE_ROWS if max_rows <= CPU_MAX_DECODE_ROWS else CPU_PREFILL_ROWS)
    rows = next((rows for rows in _cuda_tile_rows(head_dim) if max_rows <= rows), _cuda_tile_rows(head_dim)[-1])
    return _cuda(target, dtype, head_dim, rows)


def choose_merge(target: str, *, dtype: str) -> Merge:
    """Return the merge kernel that belongs to the attention kernels of `target`."""
    return Merge(dtype, f"attention/merge.{'cuh' if target in SHARED_LIMITS else 'cpp'}")


def choose_states(target: str, *, dtype: str, sum_dtype: str, aligned: bool) -> States:
    """Choose the kernel that merges states; `aligned`: all addresses and strides are multiples of 16 bytes."""
    if target not in SHARED_LIMITS:
        return States(dtype, sum_dtype, 0)
    vector = 4 if dtype == "f32" else 8
    return States(dtype, sum_dtype, vector if aligned else 1)


def _shipped_states(target: str) -> Tuple[States, ...]:
    dtypes = [dtype for dtype in STATE_DTYPES if not (dtype == "bf16" and target.endswith("_75"))]
    return tuple(
        choose_states(target, dtype=dtype, sum_dtype=sum_dtype, aligned=aligned)
        for dtype in dtypes
        for sum_dtype in sorted({dtype, "f32"})
        for aligned in ((True, False) if target in SHARED_LIMITS else (True,))
    )


def shipped(target: str) -> Tuple[AnyVariant, ...]:
    """List the variants that a wheel holds for `target`."""
    if target not in SHARED_LIMITS:
        cpu = tuple(AttentionCpu(dtype, rows) for dtype in CPU_DTYPES for rows in _CPU_KV_TILES)
        return (*cpu, *(choose_merge(target, dtype=dtype) for dtype in CPU_DTYPES), *_shipped_states(target))
    dtypes = ("f16",) if target.endswith("_75") else ("f16", "bf16")
    attention = tuple(
        _cuda(target, dtype, dim, rows) for dtype in dtypes for dim in CUDA_HEAD_DIMS for rows in _cuda_tile_rows(dim)
    )
    return (*attention, *(choose_merge(target, dtype=dtype) for dtype in dtypes), *_shipped_states(target))


def _cuda_tile_rows(head_dim: int) -> Tuple[int, ...]:
    # At 256 columns a tile of 128 rows would leave no registers for the scores.
    return (16, 64, 128) if head_dim <= 128 else (16, 64)


def _cuda(target: str, dtype: str, head_dim: int, tile_rows: int) -> Attention:
    """Give the tile as many keys as registers and shared memory hold, up to 64."""
    # Beside so large an output 64 keys fit 255 registers on sm_90 alone, at 128 columns; elsewhere they would spill.
    fits = target.startswith("sm_90") and head_dim == 128
    crowded = tile_rows * head_dim >= 128 * 128 and not fits
    for kv_tile in (32, 16) if crowded else (64, 32, 16):
        # 16 rows are shared by all warps, each with 16 keys of a step. Larger tiles are dealt to four warps: at 128
        # rows each has 32, and reads K and V from shared memory half as often as eight warps of 16 would.
        warps = kv_tile // 16 if tile_rows == 16 else 4
        variant = Attention(dtype, head_dim, tile_rows, kv_tile, warps)
        if variant.shared_bytes <= SHARED_LIMITS[target]:
            break
    return variant
