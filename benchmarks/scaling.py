"""Plot the time of attention over its floor, by batch, length and page size: `python -m benchmarks scaling`.

A floor is what the machine cannot go below: each byte of keys and values read once at the bandwidth that a large read
reaches in this run, each product once at the rate of a large matrix product, and the time of a launch that does next to
nothing. A step is a point's growth over its neighbour, as a multiple of the floor's growth; 1 is explained by it.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

import flashinfer
from benchmarks import attention_cpu, attention_gpu, plot
from benchmarks.report import Table, write_report

HEADS, HEAD_DIM, PAGE_SIZE = (32, 8), 128, 16


class Point(NamedTuple):
    """One measured size: its place on the axis, and the microseconds of its floor and of what ran."""

    size: int
    floor: float
    taken: float


class Grid(NamedTuple):
    """What is swept: batches of `batch_len` keys; lengths of some batches; page sizes of one case; prompts."""

    batches: Sequence[int]
    batch_len: int
    lengths: Sequence[int]
    length_batches: Sequence[int]
    page_sizes: Sequence[int]
    page_case: Tuple[int, int]  # requests, keys of each
    prompts: Sequence[int]


def powers(first: int, last: int) -> List[int]:
    """List powers of two."""
    return [1 << n for n in range(first.bit_length() - 1, last.bit_length())]


GPU_GRID = Grid(powers(1, 512), 1024, powers(128, 131072), (1, 16), powers(1, 256), (64, 8192), powers(128, 131072))
CPU_GRID = Grid(powers(1, 16), 256, powers(128, 8192), (1, 4), powers(1, 256), (4, 1024), powers(128, 1024))


@dataclass(frozen=True)
class Machine:
    """Where it runs: how work is timed (in us), and what floors follow from: bytes and operations of a us, idle us."""

    name: str
    device: str
    dtype: torch.dtype
    time: Callable[[Callable[[], object]], float]
    bandwidth: float
    rate: float
    idle: float

    def floor(self, size: float, operations: float = 0.0) -> float:
        """Return the microseconds that so many bytes and operations take at least."""
        return max(self.idle, size / self.bandwidth, operations / self.rate)


def this_machine() -> Machine:
    """Measure what floors follow from, on the GPU where there is one."""
    time: Callable[[Callable[[], object]], float]
    if torch.cuda.is_available():
        time, device, dtype, edge = attention_gpu.gpu_time, "cuda", torch.bfloat16, 8192
        bandwidth, name = attention_gpu.read_bandwidth(), torch.cuda.get_device_name()
        nothing = torch.empty(1, device=device)
        idle = time(nothing.zero_)
    else:
        time, device, dtype, edge = _cpu_time, "cpu", torch.float32, 1024
        data = torch.ones(attention_cpu.READ_BYTES // 4)
        bandwidth, name, idle = attention_cpu.READ_BYTES / time(data.sum), attention_cpu.processor(), 0.0
    square = torch.randn(edge, edge, device=device, dtype=dtype)
    rate = 2.0 * edge**3 / time(lambda: square @ square)
    return Machine(name, device, dtype, time, bandwidth, rate, idle)


def _cpu_time(work: Callable[[], object]) -> float:
    return attention_cpu.best_times([work], turns=2, calls=3)[0] * 1e6


def decode(machine: Machine, size: int, batch: int, kv_len: int, page_size: int) -> Point:
    """Time a decode step over a paged cache whose pages lie in random order."""
    (q_heads, kv_heads), pages = HEADS, -(-kv_len // page_size)
    shape = (batch * pages, 2, page_size, kv_heads, HEAD_DIM)
    cache = torch.randn(shape, device=machine.device, dtype=machine.dtype)
    caches = itertools.cycle([cache, *(cache.clone() for _ in range(_copies(machine, cache)))])
    q = torch.randn(batch, q_heads, HEAD_DIM, device=machine.device, dtype=machine.dtype)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(machine))
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * pages,
        torch.randperm(batch * pages, device=machine.device).int(),
        torch.full((batch,), kv_len - (pages - 1) * page_size, dtype=torch.int32),
        q_heads,
        kv_heads,
        HEAD_DIM,
        page_size,
        q_data_type=machine.dtype,
    )
    read = 2 * batch * kv_len * kv_heads * HEAD_DIM * cache.element_size()
    return Point(size, machine.floor(read), machine.time(lambda: wrapper.run(q, next(caches))))


def _copies(machine: Machine, cache: torch.Tensor) -> int:
    """Count the further caches that keep a CPU's last cache cold; a GPU's is cleared by its timer."""
    size = cache.numel() * cache.element_size()
    return attention_cpu.READ_BYTES // size if machine.device == "cpu" else 0


def prefill(machine: Machine, tokens: int) -> Point:
    """Time the causal prefill of one prompt."""
    q_heads, kv_heads = HEADS
    q = torch.randn(tokens, q_heads, HEAD_DIM, device=machine.device, dtype=machine.dtype)
    k, v = torch.randn(2, tokens, kv_heads, HEAD_DIM, device=machine.device, dtype=machine.dtype)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(machine))
    indptr = torch.tensor([0, tokens], dtype=torch.int32)
    wrapper.plan(indptr, indptr, q_heads, kv_heads, HEAD_DIM, causal=True, q_data_type=machine.dtype)
    operations = 2.0 * q_heads * HEAD_DIM * tokens * (tokens + 1)
    size = (2 * q.numel() + 2 * k.numel()) * q.element_size()
    return Point(tokens, machine.floor(size, operations), machine.time(lambda: wrapper.run(q, k, v)))


def _workspace(machine: Machine) -> torch.Tensor:
    return torch.empty(128 << 20, dtype=torch.uint8, device=machine.device)


class Sweep(NamedTuple):
    """A plot: its short name, title and axis, and the points of each line."""

    name: str
    title: str
    axis: str
    lines: Dict[str, List[Point]]

    def svg(self) -> str:
        """Draw every line above its floor."""
        series: List[plot.Series] = []
        for name, points in self.lines.items():
            series.append(plot.Series(name, [(one.size, one.taken) for one in points]))
            series.append(plot.Series(f"floor, {name}", [(one.size, one.floor) for one in points], floor=True))
        return plot.render(self.title, self.axis, "microseconds", series)

    def table(self, picture: str) -> Table:
        """Return the points as a table below the picture of that file name."""
        table = Table(self.title, ["line", self.axis, "floor us", "us", "us / floor", "step"])
        table.intro = f"![{self.title}: microseconds against {self.axis}, each with its floor]({picture})"
        for name, points in self.lines.items():
            for before, one in zip([None, *points], points):
                row = [name, one.size, one.floor, one.taken, f"{one.taken / one.floor:.2f}"]
                table.add([*row, None if before is None else f"{step(before, one):.2f}"])
        return table


def step(before: Point, after: Point) -> float:
    """Return how much more the time grew than its floor."""
    return after.taken / before.taken / (after.floor / before.floor)


def sweeps(machine: Machine, grid: Grid) -> Iterator[Sweep]:
    """Measure the grid, a plot at a time."""
    shape = f"{HEADS[0]}/{HEADS[1]} heads x {HEAD_DIM}, {str(machine.dtype).split('.')[-1]}"
    points = [decode(machine, n, n, grid.batch_len, PAGE_SIZE) for n in grid.batches]
    title = f"Decode, {shape}, page {PAGE_SIZE}: batch"
    yield Sweep("batch", title, "requests", {f"{grid.batch_len} keys each": points})
    lines = {}
    for batch in grid.length_batches:
        name = "1 request" if batch == 1 else f"{batch} requests"
        lines[name] = [decode(machine, n, batch, n, PAGE_SIZE) for n in grid.lengths]
    yield Sweep("length", f"Decode, {shape}, page {PAGE_SIZE}: length", "keys", lines)
    requests, keys = grid.page_case
    points = [decode(machine, n, requests, keys, n) for n in grid.page_sizes]
    title = f"Decode, {shape}, {requests} x {keys} keys: page size"
    yield Sweep("page", title, "tokens of a page", {f"{requests} x {keys}": points})
    points = [prefill(machine, n) for n in grid.prompts]
    yield Sweep("prefill", f"Causal prefill of one prompt, {shape}", "tokens", {"1 prompt": points})


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Measure, print, and write page and plots where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--write", type=Path, help="write the page to this file, and its plots beside it")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    machine = this_machine()
    tables: List[Table] = []
    for sweep in sweeps(machine, CPU_GRID if machine.device == "cpu" else GPU_GRID):
        picture = f"{options.write.stem if options.write else 'scaling'}-{sweep.name}.svg"
        tables.append(sweep.table(picture))
        if options.write:
            options.write.parent.mkdir(parents=True, exist_ok=True)
            (options.write.parent / picture).write_text(sweep.svg())
    speed = f"reads {machine.bandwidth / 1e3:.1f} GB/s, multiplies {machine.rate / 1e6:.2f} TFLOP/s"
    write_report(f"{machine.name}: {speed}", "python -m benchmarks scaling", tables, options.write)
    return 0
