"""Batches as tests want them: every slot that belongs to no request is poisoned, so that reading it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
import torch

import reference
from flashinfer_attention import plan_attention

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CPU_HEAD_DIMS = (8, 24, 64, 80, 128, 256)
GPU_HEAD_DIMS = (64, 128, 256)
HUGE = 2**31 - 1  # an index of a page that no cache has


def where(*, dtypes: Sequence[str] = ("f32", "f16", "bf16"), dims: Sequence[int] = CPU_HEAD_DIMS) -> List[Any]:
    """Return the (device, dtype, head_dim) that have kernels, of those asked for, as parameters with ids."""
    cpu = [pytest.param("cpu", DTYPES[t], dim, id=f"cpu-{t}-d{dim}") for t in dtypes for dim in dims]
    gpu = [
        pytest.param("cuda", DTYPES[t], dim, id=f"cuda-{t}-d{dim}", marks=pytest.mark.gpu)
        for t in dtypes
        for dim in dims
        if t != "f32" and dim in GPU_HEAD_DIMS
    ]
    return cpu + gpu


def indptr_of(lengths: Sequence[int]) -> torch.Tensor:
    """Return the running sum of lengths, from 0: int32 [len + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dataclass
class Paged:
    """A batch over a paged cache: k and v are [pages, page_size, kv_heads, dim] whatever the layout in memory.

    dim_vo: columns of v, of the same rows as k; None: dim. kv_dtype: None: dtype. poison: in what no request owns.
    """

    q_lens: List[int]
    kv_lens: List[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float16
    device: str = "cpu"
    layout: str = "NHD"
    seed: int = 0
    dim_vo: Optional[int] = None
    kv_dtype: Optional[torch.dtype] = None
    poison: float = float("nan")
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        pages = [-(-length // self.page_size) for length in self.kv_lens]
        used, spare = sum(pages), 3
        order = torch.randperm(used + spare, generator=generator)
        self.indptr = indptr_of(pages)
        self.indices = torch.cat([order[:used], torch.full((5,), HUGE)]).int()  # the table is longer than the batch
        last = [n - (p - 1) * self.page_size if n else 0 for n, p in zip(self.kv_lens, pages)]
        self.last_page_len = torch.tensor(last, dtype=torch.int32)
        self.q_indptr = indptr_of(self.q_lens)
        dim_vo = self.dim if self.dim_vo is None else self.dim_vo
        shape = (used + spare, 2, self.page_size, self.kv_heads, max(self.dim, dim_vo))
        cache = torch.randn(shape, generator=generator)
        cache[order[used:]] = self.poison
        for request, length in enumerate(last):
            if length:
                cache[order[self.indptr[request + 1] - 1], :, length:] = self.poison
        cache[:, 0, ..., self.dim :] = cache[:, 1, ..., dim_vo:] = self.poison
        q = torch.randn(sum(self.q_lens), self.heads, self.dim, generator=generator)
        self.q = q.to(self.dtype).to(self.device)
        self.cache = cache.to(self.dtype if self.kv_dtype is None else self.kv_dtype).to(self.device)
        if self.layout == "HND":
            self.cache = self.cache.transpose(2, 3).contiguous()
        k, v = self.pair
        self.k, self.v = (c.transpose(1, 2) if self.layout == "HND" else c for c in (k, v))

    @property
    def pair(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the cache as two tensors in its layout."""
        return self.cache[:, 0, ..., : self.dim], self.cache[:, 1, ..., : self.dim_vo]

    @property
    def kv_len(self) -> torch.Tensor:
        return torch.tensor(self.kv_lens, dtype=torch.int32)

    def rows(self, cache: torch.Tensor) -> List[torch.Tensor]:
        """Return the rows of each request, fp64 on the CPU."""
        return reference.gather(cache.cpu().double(), self.indices, self.indptr.tolist(), self.kv_lens)

    def expected(self, **options: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return (o, natural lse) in fp64 on the CPU."""
        k, v = self.rows(self.k), self.rows(self.v)
        return reference.ragged(self.q.cpu(), self.q_indptr.tolist(), k, v, **options)

    def check(
        self,
        o: torch.Tensor,
        lse: torch.Tensor,
        *,
        base2: bool = True,
        rounded: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        """Assert that (o, lse) is what fp64 gives; rounded: what rotated rows are kept in."""
        expected_o, expected_lse = self.expected(**options)
        reference.assert_close(o.cpu(), expected_o, self.dtype)
        natural = lse.cpu().double() * (math.log(2.0) if base2 else 1.0)
        reference.assert_lse_close(natural, expected_lse, rounded)


def plan_of(batch: Paged, **options: Any) -> Any:
    """Return the native plan of a batch; `options` are those of plan_attention, lengths included."""
    arguments: Dict[str, Any] = {
        "q_indptr": batch.q_indptr,
        "kv_indptr": batch.indptr,
        "kv_len": batch.kv_len,
        "num_qo_heads": batch.heads,
        "num_kv_heads": batch.kv_heads,
        "head_dim": batch.dim,
        "page_size": batch.page_size,
        "dtype": batch.dtype,
        "device": batch.device,
    }
    return plan_attention(**{**arguments, **options})


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return a buffer of NaN, of which every element must be written."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)
