"""Attention in fp64, one request at a time, and what its results may differ by."""

from __future__ import annotations

import math
from typing import List, Optional, Tuple

import torch

# Relative rounding of the result, and of probabilities that a 16-bit kernel rounds before the second product.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    sm_scale: Optional[float] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (o, natural lse) in fp64 of one request: q [q_len, heads, dim]; k, v [kv_len, kv_heads, dim]."""
    q_len, heads, dim = q.shape
    kv_len, kv_heads, _ = k.shape
    scale = 1 / math.sqrt(dim) if sm_scale is None else sm_scale
    queries = q.double().view(q_len, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("qhgd,khd->hgqk", queries, k.double()) * scale
    if causal:
        last = torch.arange(q_len, device=q.device)[:, None] + kv_len - q_len
        scores.masked_fill_(torch.arange(kv_len, device=q.device) > last, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # -inf where nothing is visible
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
    o = torch.einsum("hgqk,khd->qhgd", weights, v.double())
    return o.reshape(q_len, heads, dim), lse.permute(2, 0, 1).reshape(q_len, heads)


def gather(cache: torch.Tensor, table: torch.Tensor, indptr: List[int], kv_len: List[int]) -> List[torch.Tensor]:
    """Return the rows of each request, [kv_len, kv_heads, dim], from a cache [pages, page_size, kv_heads, dim]."""
    rows = []
    for request, length in enumerate(kv_len):
        pages = table[indptr[request] : indptr[request + 1]].long()
        rows.append(cache[pages].flatten(0, 1)[:length])
    return rows


def ragged(
    q: torch.Tensor,
    q_indptr: List[int],
    k: List[torch.Tensor],
    v: List[torch.Tensor],
    *,
    causal: bool = False,
    sm_scale: Optional[float] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (o, natural lse) in fp64 of a batch whose requests' keys and values come as lists."""
    results = [
        attention(q[q_indptr[i] : q_indptr[i + 1]], k[i], v[i], causal=causal, sm_scale=sm_scale) for i in range(len(k))
    ]
    if not results:
        return q.double(), q.new_zeros(q.shape[:2], dtype=torch.float64)
    return torch.cat([o for o, _ in results]), torch.cat([lse for _, lse in results])


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that outputs agree to the rounding of `dtype`; |o| is at most the largest |v|, of order 1 here.

    fp32 accumulates thousands of terms, whose errors add up to some 2^-20; 16-bit results and probabilities are
    rounded once each, to half a unit in the last place.
    """
    tolerance = max(4 * _ROUNDING[dtype], 2.0**-17)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def assert_lse_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that lse agrees, infinities included: fp32 sums and a hardware exp2 and log2, whatever q's dtype."""
    torch.testing.assert_close(got.double(), expected, rtol=2.0**-17, atol=2.0**-13)
