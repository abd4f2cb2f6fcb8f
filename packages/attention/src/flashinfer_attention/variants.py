"""Which kernels exist, which of them ship for a target, and which one a problem gets.

A variant names one template instance. `choose` is pure: print what it returns to see what would run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Dict, FrozenSet, NamedTuple, Optional, Tuple, Union

from flashinfer_core.errors import UnsupportedOptionError

PACKAGE = "flashinfer_attention"

CPU_DTYPES = ("f32", "f16", "bf16")
CPU_FP8 = ("e4m3", "e5m2")  # of keys and values, with any type of queries
CPU_MAX_HEAD_DIM = 512
CPU_DECODE_ROWS, CPU_PREFILL_ROWS, CPU_AMX_ROWS = 64, 96, 192
_CPU_KV_TILES = {CPU_DECODE_ROWS: 64, CPU_PREFILL_ROWS: 96, CPU_AMX_ROWS: 192}
# Packed rows of a KV head from which converting keys once for a blocked product pays.
CPU_MAX_DECODE_ROWS = 16
# On a CPU, workers beyond the threads let a thread that finished early take over from one that was interrupted.
CPU_WORKERS_PER_THREAD = 4
CPU_THREADS_PER_MERGER = 4

STATE_DTYPES = ("f32", "f16", "bf16")

ELEMENT_BYTES = {"f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1}
CUDA_MAX_HEAD_DIM = 256
# Columns of keys and values that tiles have room for; a problem gets the first that it fits into.
_PLAIN_DIMS = ((64, 64), (128, 128), (256, 256))
_ROTARY_DIMS = ((64, 64), (128, 128))
_CUDA_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
_NARROW_DIMS = tuple(dims for dims in _CUDA_DIMS if dims != (96, 96))  # 96 bytes are no whole share of a copy's lanes
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


_OPTIONS = frozenset(
    (
        "window_left",
        "mask",
        "logits_soft_cap",
        "alibi",
        "rope",
        "sinks",
        "v_scale",
        "scale_tensors",
        "head_dim_vo",
        "fp8",
        "deterministic",
    )
)
SUPPORT = {
    "cpu": Support("CPUs", CPU_DTYPES, tuple(range(8, CPU_MAX_HEAD_DIM + 1, 8)), _OPTIONS),
    "cuda": Support("GPUs", ("f16", "bf16"), tuple(range(8, CUDA_MAX_HEAD_DIM + 1, 8)), _OPTIONS),
}


@dataclass(frozen=True)
class Attention:
    """One instance of `attention::attention` on a GPU. Element types are spelled as in C++: f16, bf16, e4m3, e5m2.

    kv_dtype: of the cache. head_dim, head_dim_vo: columns of a key and of a value that the tile has room for. scores:
    Plain, General or Rotary, see scores.cuh.
    """

    dtype: str
    kv_dtype: str
    head_dim: int
    head_dim_vo: int
    tile_rows: int
    kv_tile: int
    warps: int
    scores: str = "Plain"

    package = PACKAGE
    source = "attention/attention.cuh"
    packs_all_heads = False

    @property
    def name(self) -> str:
        cache = "" if self.kv_dtype == self.dtype else f"-{self.kv_dtype}"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_vo else f"{self.head_dim}x{self.head_dim_vo}"
        scores = "" if self.scores == "Plain" else f"-{self.scores.lower()}"
        return f"attention-{self.dtype}{cache}-d{dims}-q{self.tile_rows}{scores}"

    @property
    def expression(self) -> str:
        scope = "flashinfer::attention::"
        cache = f"{scope}KeyValue<flashinfer::{self.kv_dtype}, {self.head_dim}, {self.head_dim_vo}>"
        tile = f"{scope}Tile<{cache}, {self.tile_rows}, {self.kv_tile}, {self.warps}>"
        return f"{scope}attention<flashinfer::{self.dtype}, {tile}, {scope}{self.scores}>"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Count the bytes of two stages of K and V, of the queries, and of what warps that share rows exchange."""
        shares_rows = self.tile_rows == 16 and self.warps > 1  # then the next item's queries are fetched ahead
        element = ELEMENT_BYTES[self.kv_dtype]
        queries = self.tile_rows * _row_bytes(self.head_dim, 2) * (2 if shares_rows else 1)
        stage = self.kv_tile * (_row_bytes(self.head_dim, element) + _row_bytes(self.head_dim_vo, element))
        return queries + 2 * stage + (128 * self.warps if shares_rows else 0) + self._extra_bytes

    @property
    def rows_of_a_copy(self) -> int:
        """Count the rows of K and V that all threads copy at once: see kRowsPerPass in tile.cuh."""
        chunks = [columns * ELEMENT_BYTES[self.kv_dtype] // 16 for columns in (self.head_dim, self.head_dim_vo)]
        return self.threads // math.gcd(*chunks, 16 if self.threads > 8 * self.kv_tile else 8)

    @property
    def _extra_bytes(self) -> int:
        narrow, rotary = ELEMENT_BYTES[self.kv_dtype] == 1, self.scores == "Rotary"
        scales = max(4 * self.tile_rows, 128) if narrow else 0
        turns = 4 * self.head_dim if rotary else 0
        return scales + turns + (self.kv_tile * _row_bytes(self.head_dim, 2) if narrow and rotary else 0)

    @property
    def max_ctas(self) -> int:
        """Bound the CTAs that share an SM on any GPU: by threads, and by the largest shared memory (sm_90)."""
        return min(2048 // self.threads, (228 << 10) // (self.shared_bytes + 1024))


def _row_bytes(columns: int, element_bytes: int) -> int:
    """Count the bytes from row to row of a matrix in shared memory: see SharedRows in tile.cuh."""
    chunks = columns * element_bytes // 16
    return 16 * (chunks if chunks % 8 == 0 else chunks | 1)


@dataclass(frozen=True)
class AttentionCpu:
    """One instance of `attention::attention` on a CPU. Element types are spelled as in C++; kv_dtype: of the cache."""

    dtype: str
    kv_dtype: str
    tile_rows: int

    package = PACKAGE
    source = "attention/attention.cpp"
    threads = 1
    shared_bytes = 0

    @property
    def name(self) -> str:
        types = self.dtype if self.dtype == self.kv_dtype else f"{self.dtype}-{self.kv_dtype}"
        return f"attention-{types}-q{self.tile_rows}"

    @property
    def expression(self) -> str:
        types = f"flashinfer::{self.dtype}, flashinfer::{self.kv_dtype}"
        return f"flashinfer::attention::attention<{types}, {self.tile_rows}>"

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

    elements: columns of a vector on a GPU, 16 bytes or one element; 0 on a CPU. ahead: states that a thread asks for
    beside the first before it needs it.
    """

    dtype: str
    sum_dtype: str
    elements: int
    ahead: int = 0

    package = PACKAGE
    shared_bytes = 0

    @property
    def source(self) -> str:
        return f"attention/states.{'cuh' if self.elements else 'cpp'}"

    @property
    def name(self) -> str:
        types = self.dtype if self.dtype == self.sum_dtype else f"{self.sum_dtype}-{self.dtype}"
        return f"states-{types}-e{self.elements}-n{self.ahead + 1}" if self.elements else f"states-{types}"

    @property
    def expression(self) -> str:
        types = f"flashinfer::{self.sum_dtype}, flashinfer::{self.dtype}"
        sizes = f", {self.elements}, {self.ahead}" if self.elements else ""
        return f"flashinfer::attention::merge_states<{types}{sizes}>"

    @property
    def threads(self) -> int:
        return 256 if self.elements else 1

    def rows_at_once(self, head_dim: int) -> int:
        """Count the rows that a CTA merges at a time; a thread has one or two vectors of a row (states.cuh)."""
        return self.threads // -(-(head_dim // self.elements) // (2 if self.ahead < 7 else 1))


AnyAttention = Union[Attention, AttentionCpu]


@dataclass(frozen=True)
class PlanLengths:
    """The kernel that plans lengths which lie on a GPU, with one CTA."""

    package = PACKAGE
    source = "core/plan.cuh"
    name = "plan"
    threads = 256
    shared_bytes = 0

    @property
    def expression(self) -> str:
        return f"flashinfer::plan<{self.threads}>"


AnyVariant = Union[Attention, AttentionCpu, Merge, PlanLengths, States]


def choose(
    target: str,
    *,
    dtype: str,
    kv_dtype: Optional[str] = None,
    head_dim: int,
    head_dim_vo: Optional[int] = None,
    max_rows: int,
    general: bool = False,
    rotary: bool = False,
) -> AnyAttention:
    """Choose the attention kernel for a batch whose longest request has `max_rows` packed rows (queries x group).

    Few rows mean decoding, which memory bandwidth bounds: a small tile leaves no row idle. kv_dtype, head_dim_vo: None
    means those of q. general: scores change one by one (window, mask, soft cap, ALiBi, RoPE). rotary: RoPE is among
    them. tile_rows do not depend on these two, so a plan for one kernel serves the others. Pure; nothing is loaded.
    """
    if target not in SHARED_LIMITS:
        decode_rows, prefill_rows = _cpu_tile_rows(target, dtype)
        rows = decode_rows if max_rows <= CPU_MAX_DECODE_ROWS else prefill_rows
        return AttentionCpu(dtype, dtype if kv_dtype is None else kv_dtype, rows)
    wanted = (head_dim, head_dim if head_dim_vo is None else head_dim_vo)
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    known = _CUDA_DIMS if kv_dtype == dtype else _NARROW_DIMS
    dims = next(dims for dims in known if wanted[0] <= dims[0] and wanted[1] <= dims[1])
    plain = dims == wanted and dims in _PLAIN_DIMS and kv_dtype == dtype and not general
    tile_rows = _cuda_tile_rows(dims)
    rows = next((rows for rows in tile_rows if max_rows <= rows), tile_rows[-1])
    return _cuda(target, dtype, kv_dtype, dims, rows, "Plain" if plain else "Rotary" if rotary else "General")


def choose_merge(target: str, *, dtype: str) -> Merge:
    """Return the merge kernel that belongs to the attention kernels of `target`."""
    return Merge(dtype, f"attention/merge.{'cuh' if target in SHARED_LIMITS else 'cpp'}")


def choose_states(target: str, *, dtype: str, sum_dtype: str, aligned: bool, states: int) -> States:
    """Choose the kernel that merges states; `aligned`: all addresses and strides are multiples of 16 bytes.

    states: of a row. A kernel that asks for more of them at a time than there are has threads wait for too little.
    """
    if target not in SHARED_LIMITS:
        return States(dtype, sum_dtype, 0)
    if not aligned:
        return States(dtype, sum_dtype, 1, 1)
    return States(dtype, sum_dtype, 4 if dtype == "f32" else 8, 1 if states <= 2 else 3 if states <= 4 else 7)


def _shipped_states(target: str) -> Tuple[States, ...]:
    dtypes = [dtype for dtype in STATE_DTYPES if not (dtype == "bf16" and target.endswith("_75"))]
    chosen = [
        choose_states(target, dtype=dtype, sum_dtype=sum_dtype, aligned=aligned, states=states)
        for dtype in dtypes
        for sum_dtype in sorted({dtype, "f32"})
        for aligned, states in ((True, 2), (True, 4), (True, 8), (False, 2))
    ]
    return tuple(dict.fromkeys(chosen))


def shipped(target: str) -> Tuple[AnyVariant, ...]:
    """List the variants that a wheel holds for `target`."""
    if target not in SHARED_LIMITS:
        cpu = tuple(
            AttentionCpu(dtype, kv_dtype, rows)
            for dtype in CPU_DTYPES
            for kv_dtype in (dtype, *CPU_FP8)
            for rows in _cpu_tile_rows(target, dtype)
        )
        return (*cpu, *(choose_merge(target, dtype=dtype) for dtype in CPU_DTYPES), *_shipped_states(target))
    dtypes = ("f16",) if target.endswith("_75") else ("f16", "bf16")
    attention = tuple(
        _cuda(target, dtype, dtype, dims, rows, scores)
        for dtype in dtypes
        for dims, scores in (
            *((dims, "General") for dims in _CUDA_DIMS),
            *((dims, "Plain") for dims in _PLAIN_DIMS),
            *((dims, "Rotary") for dims in _ROTARY_DIMS),
        )
        for rows in _cuda_tile_rows(dims)
    )
    merges = (choose_merge(target, dtype=dtype) for dtype in dtypes)
    return (*attention, *merges, PlanLengths(), *_shipped_states(target))


def _cpu_tile_rows(target: str, dtype: str) -> Tuple[int, int]:
    # AMX multiplies so fast that packing keys and values would cost too much if fewer rows shared it.
    return CPU_DECODE_ROWS, CPU_AMX_ROWS if (target, dtype) == ("x86_64_amx", "bf16") else CPU_PREFILL_ROWS


def _cuda_tile_rows(dims: Tuple[int, int]) -> Tuple[int, ...]:
    # Beyond 128 columns a tile of 128 rows would leave no registers for the scores.
    return (16, 64, 128) if max(dims) <= 128 else (16, 64)


def _cuda(target: str, dtype: str, kv_dtype: str, dims: Tuple[int, int], tile_rows: int, scores: str) -> Attention:
    """Give the tile as many keys as registers and shared memory hold."""
    narrow = ELEMENT_BYTES[kv_dtype] == 1
    choices: Tuple[Tuple[int, int], ...]
    if tile_rows == 16:
        # All warps share the rows, each with 16 keys of a step; of narrow keys 32, which are as many bytes.
        choices = ((128, 4), (64, 2), (32, 1)) if narrow else ((64, 4), (32, 2), (16, 1))
    else:
        # Rows are dealt to four warps: at 128 rows each has 32, and reads K and V from shared memory half as often as
        # eight warps of 16 would. At 128 columns, General's options need the registers that so many rows take.
        warps = 8 if tile_rows == 128 and (narrow or dims[1] == 128) and scores != "Plain" else 4
        # Beside so large an output 64 keys do not fit into 255 registers; 48 do on some architectures, at 128 columns.
        crowded = tile_rows * dims[1] >= 128 * 96 and warps == 4
        most = 48 if dims[1] == 128 and target in ("sm_80", "sm_90", "sm_90a") else 32
        choices = tuple((kv_tile, warps) for kv_tile in ((most, 16) if crowded else (64, 32, 16)))
    for kv_tile, warps in choices:
        variant = Attention(dtype, kv_dtype, *dims, tile_rows, kv_tile, warps, scores)
        if variant.shared_bytes <= SHARED_LIMITS[target] and kv_tile % variant.rows_of_a_copy == 0:
            return variant
    raise UnsupportedOptionError("head_dim", dims[0], f"less with RoPE on {target}, whose shared memory is too small")
