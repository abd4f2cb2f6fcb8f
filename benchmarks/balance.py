"""Time skewed batches next to uniform ones of the same total: `python -m benchmarks balance [--device cpu]`.

The floor of a row is what uniform batches of its decode keys and of its prefill operations take, one after the other:
a ratio of 1 says that uneven lengths cost nothing. docs/benchmarks/ has the measured constants of kernels/core/costs.h.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import torch

from benchmarks.attention_cpu import best_times, processor
from benchmarks.report import Table, write_report
from flashinfer_attention import attention, plan_attention

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
Lengths = List[Tuple[int, int]]  # queries and keys of each request


@dataclass(frozen=True)
class Case:
    """A batch, and the uniform batches whose times add up to its floor."""

    name: str
    batch: Lengths
    uniform: Tuple[Lengths, ...]


def cases(scale: int) -> List[Case]:
    """Return the cases, with all lengths divided by `scale`."""
    long = [(1, 65536 // scale)] + [(1, 512 // scale)] * 127
    zipf = [(1, max(1, 40_000 // scale // rank)) for rank in range(1, 129)]
    prefill: Lengths = [(2048 // scale, 4096 // scale)] * 2
    decode: Lengths = [(1, 2048 // scale)] * 126
    mixed = [*decode[:60], prefill[0], *decode[60:], prefill[1]]
    return [
        Case("1 of 65,536 among 127 of 512", long, (_uniform(long),)),
        Case("Zipf, 128 to 40,000 keys", zipf, (_uniform(zipf),)),
        Case("2 prefills of 2048 on 4096 among 126 decodes of 2048", mixed, (prefill, decode)),
    ]


def _uniform(batch: Lengths) -> Lengths:
    keys = sum(kv_len for _, kv_len in batch)
    return [(1, keys // len(batch) + (i < keys % len(batch))) for i in range(len(batch))]


def work_of(batch: Lengths, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call that attends, causally, over ragged keys."""
    q_indptr, kv_indptr = (torch.tensor([0, *lens]).cumsum(0).int() for lens in zip(*batch))
    plan = plan_attention(
        q_indptr=q_indptr,
        kv_indptr=kv_indptr,
        num_qo_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        causal=True,
        dtype=dtype,
        device=device,
    )
    q = torch.randn(int(q_indptr[-1]), Q_HEADS, HEAD_DIM, device=device).to(dtype)
    k, v = torch.randn(2, int(kv_indptr[-1]), KV_HEADS, HEAD_DIM, device=device).to(dtype)
    return lambda: attention(q, k, v, plan=plan)


def row(case: Case, device: torch.device, dtype: torch.dtype) -> Sequence[object]:
    """Time the batch and its floor in ms."""
    works = [work_of(batch, device, dtype) for batch in (case.batch, *case.uniform)]
    if device.type == "cuda":
        from benchmarks.attention_gpu import gpu_time

        times = [gpu_time(work) * 1e-6 for work in works]
    else:
        times = best_times(works, 5, 3)
    floor = sum(times[1:])
    return [case.name, f"{times[0] * 1e3:.3f}", f"{floor * 1e3:.3f}", f"{times[0] / floor:.2f}"]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the table, print it, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks balance", description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table as Markdown to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    scale = 1 if on_gpu else 16
    dtype = torch.bfloat16 if on_gpu else torch.float32
    lengths = "" if scale == 1 else f", lengths divided by {scale}"
    title = f"Skewed batches, {Q_HEADS}/{KV_HEADS} heads x {HEAD_DIM}, {str(dtype).split('.')[-1]}{lengths}"
    table = Table(title, ["batch", "ms", "uniform ms", "ratio"])
    for case in cases(scale):
        table.add(row(case, device, dtype))
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU: {processor()}, {torch.get_num_threads()} threads"
    write_report(name, f"python -m benchmarks balance --device {device.type}", [table], options.write)
    return 0
