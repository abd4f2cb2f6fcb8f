"""Time attention on a CPU next to reading memory and to torch's SDPA: `python -m benchmarks attention_cpu`.

What is compared takes turns of some calls, and the best turn counts: other work on the machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import flashinfer
from benchmarks.report import Table, write_report

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAGE_SIZE = 16
DECODE = ((8, 1024), (1, 8192))  # requests, keys of each; 32/8 heads x 128
PREFILL = ((1, 2048, 32, 8, 128), (8, 256, 9, 3, 64))  # requests, tokens, query heads, KV heads, head_dim
READ_BYTES = 256 << 20  # of a turn's calls; far more than the last cache holds


def best_times(works: Sequence[Callable[[], object]], turns: int, calls: int) -> List[float]:
    """Return the seconds of each piece of work: the median of `calls` consecutive ones, the least of `turns` medians.

    The first call of a turn is not timed: threads of the work before may spin for some milliseconds and take its core.
    """
    times = [float("inf")] * len(works)
    for _ in range(turns):
        for i, work in enumerate(works):
            times[i] = min(times[i], statistics.median([_seconds(work) for _ in range(calls + 1)][1:]))
    return times


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def decode_row(batch: int, kv_len: int, dtype: torch.dtype, turns: int) -> Sequence[object]:
    """Time a decode step of 32/8 heads x 128 in GB/s of keys and values, and the ratio to reading.

    Calls rotate over caches of READ_BYTES together. torch's figure includes gathering the pages, which it needs.
    """
    q_heads, kv_heads, head_dim = 32, 8, 128
    pages = kv_len // PAGE_SIZE
    first = torch.randn(batch * pages, 2, PAGE_SIZE, kv_heads, head_dim).to(dtype)
    size = first.numel() * first.element_size()
    caches = itertools.cycle([first, *(first.clone() for _ in range(READ_BYTES // size - 1))])
    q = torch.randn(batch, q_heads, head_dim).to(dtype)
    indptr = torch.arange(batch + 1, dtype=torch.int32) * pages
    indices = torch.randperm(batch * pages).int()
    last = torch.full((batch,), PAGE_SIZE, dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(16 << 20, dtype=torch.uint8))
    wrapper.plan(indptr, indices, last, q_heads, kv_heads, head_dim, PAGE_SIZE, q_data_type=dtype)

    def torch_decode() -> torch.Tensor:
        k, v = next(caches)[indices].view(batch, pages, 2, PAGE_SIZE, kv_heads, head_dim).unbind(2)
        k, v = (x.reshape(batch, kv_len, kv_heads, head_dim).transpose(1, 2) for x in (k, v))
        k, v = (x.repeat_interleave(q_heads // kv_heads, 1) for x in (k, v))
        return scaled_dot_product_attention(q[:, :, None], k, v)

    buffer = torch.ones(READ_BYTES // 4)
    works = (buffer.sum, lambda: wrapper.run(q, next(caches)), torch_decode)
    reading, ours, theirs = best_times(works, turns, 8)
    read, reached, other = READ_BYTES / reading / 1e9, size / ours / 1e9, size / theirs / 1e9
    return [f"{batch} x {kv_len}", _name(dtype), read, reached, f"{reached / read:.2f}", f"{other:.2f}"]


def prefill_row(case: Tuple[int, int, int, int, int], dtype: torch.dtype, turns: int) -> Sequence[object]:
    """Time causal prefill in GFLOP/s of visible pairs, and the ratio to torch with repeated KV heads."""
    batch, tokens, q_heads, kv_heads, head_dim = case
    q = torch.randn(batch * tokens, q_heads, head_dim).to(dtype)
    k, v = torch.randn(2, batch * tokens, kv_heads, head_dim).to(dtype)
    indptr = torch.arange(batch + 1, dtype=torch.int32) * tokens
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16 << 20, dtype=torch.uint8))
    wrapper.plan(indptr, indptr, q_heads, kv_heads, head_dim, causal=True, q_data_type=dtype)
    shaped = [x.view(batch, tokens, -1, head_dim).transpose(1, 2) for x in (q, k, v)]
    repeated = [x.repeat_interleave(q_heads // x.shape[1], 1) for x in shaped]
    works = (
        lambda: wrapper.run(q, k, v),
        lambda: scaled_dot_product_attention(repeated[0], repeated[1], repeated[2], is_causal=True),
    )
    ours, theirs = best_times(works, turns, 2)
    flops = 2.0 * batch * q_heads * head_dim * tokens * (tokens + 1)
    name = f"{batch} x {tokens}, {q_heads}/{kv_heads} x {head_dim}"
    return [name, _name(dtype), flops / ours / 1e9, flops / theirs / 1e9, f"{theirs / ours:.2f}"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[-1]


def processor() -> str:
    """Name the processor as Linux does."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpuinfo() -> List[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the tables, print them, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention_cpu", description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the tables as Markdown to this file")
    parser.add_argument("--turns", type=int, default=5, help="blocks of calls of each; the best counts")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    columns = ["batch x keys", "dtype", "read GB/s", "GB/s", "ratio", "torch GB/s"]
    decode = Table(f"Decode, 32/8 heads x 128, page {PAGE_SIZE}", columns)
    prefill = Table("Causal prefill", ["case", "dtype", "GFLOP/s", "torch GFLOP/s", "ratio"])
    for batch, kv_len in DECODE:
        for dtype in DTYPES:
            decode.add(decode_row(batch, kv_len, dtype, options.turns))
    for case in PREFILL:
        for dtype in DTYPES:
            prefill.add(prefill_row(case, dtype, options.turns))
    device = f"CPU: {processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    write_report(device, "python -m benchmarks attention_cpu", [decode, prefill], options.write)
    return 0
