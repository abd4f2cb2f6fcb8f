"""Threads with wrappers of their own give the bits that they give one after another."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, List, Tuple

import torch

import flashinfer
from batches import Paged

THREADS = 8
ROUNDS = 6


class Job:
    """What one thread does: plan and run batches of its own, in turn."""

    def __init__(self, seed: int, device: str) -> None:
        self.device = device
        self.batches = [
            Paged([1] * 4, [9000 + seed, 1, 700 * seed, 0], seed=seed, device=device),
            Paged([40 + seed, 1, 0], [3000, 5000, 9], seed=seed, device=device),
        ]
        workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty_like(workspace))

    def run(self) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        results: List[Any] = []
        for _ in range(ROUNDS):
            decode, prefill = self.batches
            shape = (decode.heads, decode.kv_heads, decode.dim, decode.page_size)
            self.decode.plan(decode.indptr, decode.indices, decode.last_page_len, *shape)
            results.append(self.decode.run(decode.q, decode.cache, return_lse=True))
            tables = (prefill.q_indptr, prefill.indptr, prefill.indices, prefill.last_page_len)
            self.prefill.plan(*tables, *shape, causal=True)
            results.append(self.prefill.run(prefill.q, prefill.cache, return_lse=True))
        return [(o.cpu(), lse.cpu()) for o, lse in results]


def test_threads_give_the_bits_of_one_after_another(device: str) -> None:
    jobs = [Job(seed, device) for seed in range(THREADS)]
    alone = [job.run() for job in jobs]
    together: List[Any] = [None] * THREADS
    barrier = threading.Barrier(THREADS)

    def work(index: int) -> None:
        stream: Any = torch.cuda.Stream  # some releases of torch leave it untyped
        own: Any = torch.cuda.stream(stream()) if device == "cuda" else contextlib.nullcontext()
        with own:
            barrier.wait()
            together[index] = jobs[index].run()

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, found, expected in zip(jobs, together, alone):
        assert len(found) == 2 * ROUNDS
        for (o, lse), (expected_o, expected_lse) in zip(found, expected):
            assert torch.equal(o, expected_o)
            assert torch.equal(lse, expected_lse)
        job.batches[0].check(*found[0])
