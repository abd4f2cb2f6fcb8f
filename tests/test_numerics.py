"""Numbers and sizes that break softmax kernels, through the native operators, against fp64."""

from __future__ import annotations

import math
from typing import Tuple

import pytest
import torch

import reference
from batches import Paged
from calls import KINDS, LENGTHS, Call, add_option, check, lacks, native, packed
from flashinfer_core.errors import UnsupportedOptionError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("causal",), ("causal", "window"), ("sinks", "mask")], ids="+".join)
def test_logits_of_ten_thousand(device: str, kind: str, names: Tuple[str, ...]) -> None:
    """Products are whole numbers, which fp32 holds, so that what is seen is the softmax's error and not theirs."""
    batch = Paged(*LENGTHS[kind], device=device)
    batch.q.copy_((batch.q * 8).round() * 16)
    batch.cache.copy_(torch.where(batch.cache.isfinite(), (batch.cache * 2).round(), batch.cache))
    call = Call()
    call.add(None, sm_scale=2.0)
    for name in names:
        add_option(call, name, batch)
    if kind == "single":
        _, lse = batch.expected(causal=True, sm_scale=2.0)
        assert lse.max() > 1e4
    check(kind, batch, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_rows_that_see_nothing(device: str, kind: str, sinks: bool) -> None:
    batch = Paged(*LENGTHS[kind], device=device)
    call = Call(["mask"], {"has_mask": True})
    masks = [torch.zeros(q, k, dtype=torch.bool) for q, k in zip(batch.q_lens, batch.kv_lens)]
    call.run["mask"], call.run["mask_indptr"] = (t.to(device) for t in packed(masks))
    call.expected["masks"] = masks
    if sinks:
        add_option(call, "sinks", batch)
    check(kind, batch, call)


@pytest.mark.parametrize(
    "names", [("sinks",), ("window", "soft-cap"), ("rope", "k-heads"), ("mask", "alibi")], ids="+".join
)
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_a_hundred_thousand_keys(device: str, q_len: int, names: Tuple[str, ...]) -> None:
    batch = Paged([1, q_len, 1], [5, 100_000, 0], heads=4, kv_heads=1, page_size=64, device=device)
    call = Call()
    for name in ("causal", *names):
        add_option(call, name, batch)
    check("paged", batch, call)


@pytest.mark.parametrize("q_len", [1, 40])
def test_keys_before_the_window_are_not_read(device: str, q_len: int) -> None:
    batch = Paged([q_len], [3000], page_size=16, device=device)
    call = Call()
    add_option(call, "window", batch)
    add_option(call, "causal", batch)
    o, lse = batch.expected(**call.expected)
    first = 3000 - q_len - 11
    hidden = batch.indices[: first // 16].long().to(device)
    batch.cache[hidden] = math.nan
    if lacks(batch, call):
        with pytest.raises(UnsupportedOptionError):
            native("paged", batch, call)
        return
    got = native("paged", batch, call)
    reference.assert_close(got[0].cpu(), o, batch.dtype)
    reference.assert_lse_close(got[1].cpu(), lse)


@pytest.mark.parametrize("names", [("window",), ("sinks", "soft-cap"), ("mask",)], ids="+".join)
@pytest.mark.parametrize("q_len", [1, 30])
def test_pages_beyond_four_gigabytes(device: str, q_len: int, names: Tuple[str, ...]) -> None:
    """Pages lie up to 8.6 GB apart by stride; a CPU commits only those that are written."""
    pages, size, heads, dim = 33_000, 128, 2, 256
    batch = Paged([q_len], [3 * size - 5], heads=4, kv_heads=heads, dim=dim, page_size=size, device=device)
    cache = torch.empty(pages, 2, size, heads, dim, dtype=torch.float16, device=device)
    far = torch.tensor([pages - 1, 0, pages // 2])
    for new, old in zip(far.tolist(), batch.indices[:3].tolist()):
        cache[new] = batch.cache[old]
    call = Call()
    for name in names:
        add_option(call, name, batch)
    expected_o, expected_lse = batch.expected(**call.expected)
    batch.k, batch.v = cache.unbind(1)
    batch.indices[:3] = far
    if lacks(batch, call):
        with pytest.raises(UnsupportedOptionError):
            native("paged", batch, call)
        return
    o, lse = native("paged", batch, call)
    reference.assert_close(o.cpu(), expected_o, batch.dtype)
    reference.assert_lse_close(lse.cpu(), expected_lse)
