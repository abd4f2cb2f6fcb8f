"""Attention in fp64 with every option, one request at a time, and what its results may differ by."""

from __future__ import annotations

import math
from typing import Any, List, Optional, Sequence, Tuple

import torch

# Relative rounding of the result, and of what a 16-bit kernel rounds before a product: probabilities, rotated rows.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    sm_scale: Optional[float] = None,
    logits_soft_cap: float = 0.0,
    alibi: bool = False,
    rope: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    sinks: Optional[torch.Tensor] = None,
    q_scale: Any = 1.0,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    mask: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (o, natural lse) in fp64 of one request; scales: one or [kv_heads], mask: bool [q_len, kv_len]."""
    (q_len, heads, dim), (kv_len, kv_heads, _) = q.shape, k.shape
    key, query = torch.arange(kv_len), torch.arange(q_len)[:, None] + kv_len - q_len
    k_scale, v_scale, q_scale = (torch.as_tensor(scale).double().cpu() for scale in (k_scale, v_scale, q_scale))
    q, k, v = q.double() * q_scale, k.double() * k_scale.view(-1, 1), v.double() * v_scale.view(-1, 1)
    if rope:
        q, k = (_rotated(x, p.view(-1) / rope_scale, rope_theta) for x, p in ((q, query), (k, key)))
    queries = q.view(q_len, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("qhgd,khd->hgqk", queries, k).flatten(0, 1) * (dim**-0.5 if sm_scale is None else sm_scale)
    if alibi:
        scores += torch.tensor(_slopes(heads)).double()[:, None, None] * (key - query)
    if logits_soft_cap:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    visible = mask if mask is not None else (key <= query) if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
    if window_left >= 0:
        visible = visible & (key >= query - window_left)
    scores.masked_fill_(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # -inf where nothing is visible
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double().cpu()[:, None])
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
    o = torch.einsum("hgqk,khd->qhgd", weights.view(kv_heads, heads // kv_heads, q_len, kv_len), v)
    return o.flatten(1, 2), lse.transpose(0, 1)


def _rotated(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = (positions.double()[:, None] * theta ** (-torch.arange(half).double() / half))[:, None]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], dim=-1)


def _slopes(heads: int) -> List[float]:
    power = 2 ** int(math.log2(heads))
    return [
        2 ** (-8 * (h + 1) / power) if h < power else 2 ** (-4 * (2 * (h - power) + 1) / power) for h in range(heads)
    ]


def gather(cache: torch.Tensor, table: torch.Tensor, indptr: List[int], kv_len: List[int]) -> List[torch.Tensor]:
    """Return the rows of each request, [kv_len, kv_heads, dim], from a cache [pages, page_size, kv_heads, dim]."""
    pages = (table[indptr[request] : indptr[request + 1]].long() for request in range(len(kv_len)))
    return [cache[entries].flatten(0, 1)[:length] for entries, length in zip(pages, kv_len)]


def ragged(
    q: torch.Tensor, q_indptr: List[int], k: Sequence[Any], v: Sequence[Any], *, masks: Any = None, **options: Any
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (o, natural lse) in fp64 of a batch whose requests' keys, values and masks come as lists."""
    if not k:
        return q.double(), q.new_zeros(q.shape[:2], dtype=torch.float64)
    rows = [q[q_indptr[i] : q_indptr[i + 1]] for i in range(len(k))]
    results = [attention(*args, mask=mask, **options) for *args, mask in zip(rows, k, v, masks or [None] * len(k))]
    return torch.cat([o for o, _ in results]), torch.cat([lse for _, lse in results])


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that outputs of order 1 agree: fp32 errors add up to some 2^-20, 16-bit results and P are rounded once."""
    tolerance = max(4 * _ROUNDING[dtype], 2.0**-17)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def assert_lse_close(got: torch.Tensor, expected: torch.Tensor, rounded: torch.dtype = torch.float32) -> None:
    """Assert that lse agrees, infinities included: fp32 sums and hardware exp2, after rows `rounded` by a rotation."""
    tolerance = max(2.0**-13, 4 * _ROUNDING[rounded])
    torch.testing.assert_close(got.double(), expected, rtol=2.0**-17, atol=tolerance)
