"""Time attention and append on a GPU next to torch's SDPA in the same run: `python -m benchmarks attention_gpu`.

GPU time is the median over replays of a CUDA graph with a cold L2 cache; host time is what `plan` and `run` keep the
CPU busy. Floors count each byte of keys and values once, at the bandwidth that a large read reaches in this run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashinfer
from benchmarks.report import Table, write_report

HEAD_DIM = 128
DTYPE = torch.bfloat16
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "torch FA2": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Decode:
    """One row of the decode table: heads, requests, keys of each, tokens of a page."""

    heads: Tuple[int, int]
    batch: int
    kv_len: int
    page_size: int


@dataclass(frozen=True)
class Prefill:
    """One row of the prefill table: heads, requests, queries and keys of each."""

    heads: Tuple[int, int]
    batch: int
    q_len: int
    kv_len: int
    causal: bool

    @property
    def flops(self) -> float:
        """Count two operations for each product of q k^T and of p v that is visible."""
        hidden = self.q_len * (self.q_len - 1) / 2 if self.causal else 0
        return 4.0 * self.batch * self.heads[0] * HEAD_DIM * (self.q_len * self.kv_len - hidden)

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        on = "" if self.q_len == self.kv_len else f" on {self.kv_len}"
        return f"{kind} {self.batch} x {self.q_len}{on}, {self.heads[0]}/{self.heads[1]}"


DECODE = (
    Decode((32, 8), 1, 8192, 16),
    Decode((32, 8), 16, 1024, 16),
    Decode((32, 8), 64, 1024, 16),
    Decode((32, 8), 64, 8192, 16),
    Decode((32, 8), 64, 8192, 1),
    Decode((32, 32), 32, 2048, 16),
    Decode((64, 8), 1, 131072, 64),
)
PREFILL = (
    Prefill((32, 8), 1, 1024, 1024, True),
    Prefill((32, 8), 4, 2048, 2048, True),
    Prefill((32, 8), 1, 8192, 8192, True),
    Prefill((32, 8), 1, 32768, 32768, True),
    Prefill((32, 32), 2, 8192, 8192, False),
    Prefill((32, 8), 16, 128, 4096, True),
    Prefill((32, 8), 16, 512, 512, True),
)


def gpu_time(work: Callable[[], object], repeats: int = 15) -> float:
    """Return the median microseconds of a CUDA graph of `work` with a cold L2 cache."""
    cold = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    event: Any = torch.cuda.Event  # some releases of torch leave it untyped
    times: List[float] = []
    for _ in range(repeats):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        cold.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def host_time(work: Callable[[], object], repeats: int = 50) -> float:
    """Return the median microseconds that a call keeps the CPU busy, with an idle GPU before each."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Return bytes per microsecond of a large reduction, which reads and hardly writes."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return data.numel() * 4 / gpu_time(lambda: data.sum(), repeats=5)


def torch_times(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> List[Optional[float]]:
    """Time torch's backends on [batch, heads, tokens, head_dim]; None where one refuses the problem."""
    times: List[Optional[float]] = []
    for backend in BACKENDS.values():
        try:
            with sdpa_kernel(backend):
                call = scaled_dot_product_attention
                times.append(gpu_time(lambda: call(q, k, v, is_causal=causal, enable_gqa=True)))  # noqa: B023
        except RuntimeError:
            times.append(None)
    return times


def wrapper_times(case: Decode, q: torch.Tensor) -> Tuple[float, float, float]:
    """Return microseconds of `run` on the GPU, of `plan` on the host and of `run` on the host."""
    (q_heads, kv_heads), pages = case.heads, case.kv_len // case.page_size
    shape = (case.batch * pages, 2, case.page_size, kv_heads, HEAD_DIM)
    cache = torch.randn(shape, device="cuda", dtype=DTYPE)
    indptr = torch.arange(case.batch + 1, dtype=torch.int32) * pages
    indices = torch.randperm(case.batch * pages, device="cuda").int()
    last = torch.full((case.batch,), case.page_size, dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"))
    lengths = (indptr, indices, last, q_heads, kv_heads, HEAD_DIM, case.page_size)
    wrapper.plan(*lengths, q_data_type=DTYPE)
    taken = gpu_time(lambda: wrapper.run(q, cache))
    planning = host_time(lambda: wrapper.plan(*lengths, q_data_type=DTYPE))
    return taken, planning, host_time(lambda: wrapper.run(q, cache))


def decode_row(case: Decode, bandwidth: float) -> Sequence[object]:
    """Time one decode case: the wrapper, host time, torch on contiguous keys."""
    q_heads, kv_heads = case.heads
    q = torch.randn(case.batch, q_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    taken, planning, submitting = wrapper_times(case, q)
    k, v = torch.randn(2, case.batch, kv_heads, case.kv_len, HEAD_DIM, device="cuda", dtype=DTYPE)
    others = torch_times(q[:, :, None], k, v, causal=False)
    name = f"{q_heads}/{kv_heads}, {case.batch} x {case.kv_len}, page {case.page_size}"
    return [name, 2 * k.numel() * k.element_size() / bandwidth, taken, *others, planning, submitting]


def prefill_row(case: Prefill) -> Sequence[object]:
    """Time one prefill case in TFLOP/s: ragged, paged by 16, torch."""
    (q_heads, kv_heads), batch = case.heads, case.batch
    q = torch.randn(batch * case.q_len, q_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    k, v = torch.randn(2, batch * case.kv_len, kv_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    qo_indptr = torch.arange(batch + 1, dtype=torch.int32) * case.q_len
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    kv_indptr = torch.arange(batch + 1, dtype=torch.int32) * case.kv_len
    ragged.plan(qo_indptr, kv_indptr, q_heads, kv_heads, HEAD_DIM, causal=case.causal, q_data_type=DTYPE)
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
    pages = case.kv_len // 16
    last = torch.full((batch,), 16, dtype=torch.int32)
    table = torch.arange(batch * pages, device="cuda").int()
    paged.plan(
        qo_indptr,
        torch.arange(batch + 1, dtype=torch.int32) * pages,
        table,
        last,
        q_heads,
        kv_heads,
        HEAD_DIM,
        16,
        causal=case.causal,
        q_data_type=DTYPE,
    )
    cache = (k.view(-1, 16, kv_heads, HEAD_DIM), v.view(-1, 16, kv_heads, HEAD_DIM))
    times: List[Optional[float]] = [
        gpu_time(lambda: ragged.run(q, k, v)),
        gpu_time(lambda: paged.run(q, cache)),
    ]
    if case.q_len == case.kv_len or not case.causal:  # torch's causal mask is aligned to the first key
        shaped = [x.view(batch, -1, x.shape[1], HEAD_DIM).transpose(1, 2) for x in (q, k, v)]
        times += torch_times(shaped[0], shaped[1], shaped[2], case.causal)
    else:
        times += [None, None]
    return [str(case), *(None if taken is None else case.flops / taken / 1e6 for taken in times)]


def append_row(tokens: int, bandwidth: float) -> Sequence[object]:
    """Time appending `tokens` tokens of 8 heads to one request."""
    key, value = torch.randn(2, tokens, 8, HEAD_DIM, device="cuda", dtype=DTYPE)
    pages = -(-tokens // 16)
    cache = torch.empty(pages, 2, 16, 8, HEAD_DIM, device="cuda", dtype=DTYPE)
    zeros = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    table, indptr = torch.randperm(pages, device="cuda").int(), torch.tensor([0, pages], device="cuda").int()
    last = torch.tensor([(tokens - 1) % 16 + 1], device="cuda").int()
    taken = gpu_time(lambda: flashinfer.append_paged_kv_cache(key, value, zeros, positions, cache, table, indptr, last))
    return [f"{tokens} tokens", 4 * key.numel() * 2 / bandwidth, taken, 4 * key.numel() * 2 / taken / 1e6]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the tables, print them, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention_gpu", description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the tables as Markdown to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("attention_gpu: no GPU here, nothing to time")
        return 0
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    columns = ["floor us", "us", *(f"{name} us" for name in BACKENDS), "plan host us", "run host us"]
    decode = Table("Decode, bf16, head_dim 128", ["heads, batch x keys", *columns])
    prefill = Table("Prefill, bf16, head_dim 128, TFLOP/s", ["case", "ragged", "page 16", *BACKENDS])
    append = Table("Append, bf16, 8 heads x 128, page 16", ["case", "floor us", "us", "TB/s"])
    for case in DECODE:
        decode.add(decode_row(case, bandwidth))
    for shape in PREFILL:
        prefill.add(prefill_row(shape))
    for tokens in (64, 8192):
        append.add(append_row(tokens, bandwidth))
    write_report(
        f"GPU: {torch.cuda.get_device_name()}, read bandwidth {bandwidth / 1e6:.2f} TB/s",
        "python -m benchmarks attention_gpu",
        [decode, prefill, append],
        options.write,
    )
    return 0
