"""Time merging states and shared-prefix decoding on a GPU: `python -m benchmarks cascade`.

256 requests share a prefix. Cascade reads it once; flat decode reads it for every request, from caches of their own or
through page tables that name the same pages, whose rereads the L2 cache serves in part. GPU time is the median over
replays of a CUDA graph with a cold L2 cache. Floors count each byte once at the bandwidth that a large read reaches in
this run; beside merging stands torch.add of two tensors, which reads and writes as much as merging two states.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

import torch

import flashinfer
from benchmarks.attention_gpu import gpu_time, read_bandwidth
from benchmarks.report import Table, write_report
from flashinfer_attention import CascadePlan, PrefixTree, cascade_attention, plan_cascade
from flashinfer_attention.states import merge_states

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
DTYPE = torch.bfloat16
BATCH, PREFIX = 256, 8192
SUFFIXES = (128, 256, 512, 1024, 2048)
MERGES = (2, 4, 8)  # states of 4096 tokens x 32 heads x 128
KEY_BYTES = 2 * KV_HEADS * HEAD_DIM * 2  # keys and values of a token in all heads


class Case(NamedTuple):
    """Requests that share a prefix and have a suffix each, one new token a request; lengths are whole pages."""

    batch: int
    prefix: int
    suffix: int

    @property
    def cascade_bytes(self) -> int:
        return (self.prefix + self.batch * self.suffix) * KEY_BYTES

    @property
    def flat_bytes(self) -> int:
        return self.batch * (self.prefix + self.suffix) * KEY_BYTES

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * (self.prefix + self.suffix) * Q_HEADS * HEAD_DIM

    def tree(self) -> PrefixTree:
        """Return the prefix as node 0, and a leaf for each request."""
        pages = [self.prefix // PAGE_SIZE] + [self.suffix // PAGE_SIZE] * self.batch
        starts = [0]
        for count in pages:
            starts.append(starts[-1] + count)
        return PrefixTree(
            parent=[-1] + [0] * self.batch,
            leaf=list(range(1, self.batch + 1)),
            kv_indptr=starts,
            kv_len=[self.prefix] + [self.suffix] * self.batch,
            page_size=PAGE_SIZE,
        )


def cache_of(pages: int) -> torch.Tensor:
    """Return a cache [pages, 2, page_size, heads, head_dim] of random numbers."""
    shape = (pages, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    return torch.empty(shape, dtype=DTYPE, device="cuda").normal_()


def planned(case: Case) -> CascadePlan:
    """Plan with the strategy that auto picks."""
    pages = (case.prefix + case.batch * case.suffix) // PAGE_SIZE
    return plan_cascade(
        tree=case.tree(),
        q_indptr=torch.arange(case.batch + 1, dtype=torch.int32),
        page_table=torch.randperm(pages, device="cuda").int(),
        num_qo_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device="cuda",
    )


def flat_time(case: Case, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor) -> float:
    """Time the decode wrapper, for which each request's pages are its own list."""
    pages = (case.prefix + case.suffix) // PAGE_SIZE
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"))
    indptr = torch.arange(case.batch + 1, dtype=torch.int32) * pages
    last = torch.full((case.batch,), PAGE_SIZE, dtype=torch.int32)
    wrapper.plan(indptr, indices, last, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=DTYPE)
    return gpu_time(lambda: wrapper.run(q, cache))


def flat_times(case: Case, q: torch.Tensor, shared: torch.Tensor) -> List[float]:
    """Return microseconds of flat decode over caches of their own, and over tables that name the same prefix pages."""
    prefix, suffix = case.prefix // PAGE_SIZE, case.suffix // PAGE_SIZE
    own = torch.arange(case.batch * suffix, dtype=torch.int32, device="cuda").view(case.batch, suffix) + prefix
    first = torch.arange(prefix, dtype=torch.int32, device="cuda").expand(case.batch, prefix)
    through_tables = flat_time(case, q, shared, torch.cat([first, own], 1).flatten())
    unshared = cache_of(case.batch * (prefix + suffix))
    alone = flat_time(case, q, unshared, torch.randperm(len(unshared), device="cuda").int())
    return [alone, through_tables]


def cascade_row(case: Case, bandwidth: float) -> Sequence[object]:
    """Time one case."""
    q = torch.randn(case.batch, Q_HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
    plan = planned(case)
    shared = cache_of((case.prefix + case.batch * case.suffix) // PAGE_SIZE)
    k, v = shared.unbind(1)
    taken = gpu_time(lambda: cascade_attention(q, k, v, plan=plan))
    alone, through_tables = flat_times(case, q, shared)
    return [
        f"{case.suffix}",
        plan.strategy,
        case.cascade_bytes / bandwidth,
        case.flops / taken / 1e6,
        taken,
        case.flat_bytes / bandwidth,
        alone,
        through_tables,
        alone / taken,
        through_tables / taken,
        case.cascade_bytes / 1e9,
        case.flat_bytes / 1e9,
    ]


def merge_row(count: int, bandwidth: float) -> Sequence[object]:
    """Time merging `count` states of 4096 x 32 x 128."""
    o = torch.randn(4096, count, 32, HEAD_DIM, device="cuda", dtype=DTYPE)
    lse = torch.randn(4096, count, 32, device="cuda")
    moved = (count + 1) * 4096 * 32 * (HEAD_DIM * 2 + 4)
    taken = gpu_time(lambda: merge_states(o, lse))
    adding = gpu_time(lambda: torch.add(o[:, 0], o[:, 1])) if count == 2 else None
    return [f"{count} states", moved / bandwidth, taken, moved / taken / 1e6, adding]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the tables, print them, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cascade", description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the tables as Markdown to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("cascade: no GPU here, nothing to time")
        return 0
    torch.manual_seed(0)
    reading = read_bandwidth()
    merges = Table("Merging states, bf16, 4096 x 32 x 128", ["case", "floor us", "us", "TB/s", "torch.add us"])
    for count in MERGES:
        merges.add(merge_row(count, reading))
    title = f"Decoding for {BATCH} requests behind a prefix of {PREFIX}, bf16, 32/8 heads x 128, page {PAGE_SIZE}"
    columns = ["suffix", "strategy", "floor us", "TFLOP/s", "us", "flat floor us", "flat us", "flat, same pages us"]
    columns += ["flat / cascade", "same pages / cascade", "cache GB", "unshared GB"]
    cascade = Table(title, columns)
    print(planned(Case(BATCH, PREFIX, SUFFIXES[0])).explain())
    for suffix in SUFFIXES:
        cascade.add(cascade_row(Case(BATCH, PREFIX, suffix), reading))
    device = f"GPU: {torch.cuda.get_device_name()}, read bandwidth {reading / 1e6:.2f} TB/s"
    write_report(device, "python -m benchmarks cascade", [merges, cascade], options.write)
    return 0
