"""Merging attention states against fp64: shapes, strides and types, the algebra, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any, List, Tuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from batches import DTYPES, indptr_of, poisoned
from flashinfer_attention import variants
from flashinfer_attention.states import merge_ragged_states, merge_state, merge_state_in_place, merge_states
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedOptionError
from flashinfer_core.targets import TARGETS

ALL_TYPES = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
State = Tuple[torch.Tensor, torch.Tensor]


def states(tokens: int, count: int, heads: int, dim: int, *, dtype: torch.dtype, device: str, seed: int = 0) -> State:
    """Return [tokens, count, heads, dim] and [tokens, count, heads]; a quarter of the states are units."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(tokens, count, heads, dim, generator=generator).to(dtype)
    lse = torch.randn(tokens, count, heads, generator=generator) * 5
    unit = torch.rand(tokens, count, heads, generator=generator) < 0.25
    o[unit], lse[unit] = 0, -math.inf
    return o.to(device), lse.to(device)


def expected(o: torch.Tensor, lse: torch.Tensor) -> State:
    """Merge along dimension 1 in fp64; rows without a key are the unit."""
    o, lse = o.cpu().double(), lse.cpu().double()
    total = torch.logsumexp(lse, dim=1)
    weights = torch.exp(lse - total.masked_fill(total.isinf(), 0)[:, None])
    return (weights[..., None] * o).sum(1), total


def check(got: State, want: State, dtype: torch.dtype) -> None:
    reference.assert_close(got[0].cpu(), want[0], dtype)
    reference.assert_lse_close(got[1].cpu(), want[1])


@ALL_TYPES
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 128, 256, 512])
def test_two_states(device: str, dtype: torch.dtype, dim: int) -> None:
    o, lse = states(33, 2, 5, dim, dtype=dtype, device=device)
    out, total = poisoned((33, 5, dim), dtype, device), poisoned((33, 5), torch.float32, device)
    got = merge_state(o[:, 0], lse[:, 0], o[:, 1], lse[:, 1], out=out, lse=total)
    assert got[0] is out
    assert got[1] is total
    check(got, expected(o, lse), dtype)


@ALL_TYPES
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 8, 20])
def test_many_states(device: str, dtype: torch.dtype, count: int) -> None:
    o, lse = states(19, count, 3, 64, dtype=dtype, device=device)
    out, total = poisoned((19, 3, 64), dtype, device), poisoned((19, 3), torch.float32, device)
    check(merge_states(o, lse, out=out, lse_out=total), expected(o, lse), dtype)


def test_a_large_batch_in_many_blocks(device: str) -> None:
    o, lse = states(700, 4, 32, 128, dtype=torch.float16, device=device)
    check(merge_states(o, lse), expected(o, lse), torch.float16)


@pytest.mark.parametrize("states_first", [False, True], ids=["tokens-first", "states-first"])
def test_strides(device: str, states_first: bool) -> None:
    """States side by side as cascade levels leave them, heads of a wider tensor, and lse by head."""
    o, lse = states(21, 3, 6, 64, dtype=torch.float16, device=device)
    wide = poisoned((21, 3, 9, 72), torch.float16, device)[:, :, 2:8, 8:]
    wide.copy_(o)
    if states_first:
        wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
    by_head = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    out = poisoned((21, 8, 64), torch.float16, device)[:, 1:7]
    total = poisoned((6, 21), torch.float32, device).t()
    check(merge_states(wide, by_head, out=out, lse_out=total), expected(o, lse), torch.float16)


@ALL_TYPES
@pytest.mark.parametrize("count", [2, 7])
def test_addresses_that_are_no_multiple_of_16_bytes(device: str, dtype: torch.dtype, count: int) -> None:
    o, lse = states(9, count, 2, 512, dtype=dtype, device=device)
    odd = torch.empty(o.numel() + 1, dtype=dtype, device=device)[1:].view(o.shape)
    odd.copy_(o)
    check(merge_states(odd, lse), expected(o, lse), dtype)


def test_rows_beyond_31_bits(device: str) -> None:
    """Two states 2^31 elements apart: a CPU commits only the pages that are written."""
    apart = 2**31 + 64
    o, lse = states(2, 2, 1, 64, dtype=torch.float16, device=device)
    memory = torch.empty(apart + 256, dtype=torch.float16, device=device)
    far = memory.as_strided((2, 2, 1, 64), (64, apart, 64, 1))
    far.copy_(o)
    check(merge_states(far, lse), expected(o, lse), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_sum_in_fp32_takes_16_bit_states(device: str, dtype: torch.dtype, aligned: bool) -> None:
    first, first_lse = states(11, 1, 4, 128, dtype=torch.float32, device=device, seed=1)
    other, other_lse = states(11, 1, 4, 128, dtype=dtype, device=device, seed=2)
    if not aligned:
        other = torch.cat([other.new_zeros(1), other.flatten()])[1:].view(other.shape)
    total, lse = first[:, 0].clone(), first_lse[:, 0].clone()
    merge_state_in_place(total, lse, other[:, 0], other_lse[:, 0])
    want = expected(torch.cat([first, other.float()], 1), torch.cat([first_lse, other_lse], 1))
    check((total, lse), want, torch.float32)


@pytest.mark.parametrize("mask_type", [None, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("dim", [64, 512])
def test_in_place(device: str, dim: int, mask_type: Any) -> None:
    o, lse = states(50, 2, 4, dim, dtype=torch.float16, device=device)
    mask = None if mask_type is None else (torch.arange(50) % 3 > 0).to(mask_type).to(device)
    got = o[:, 0].clone(), lse[:, 0].clone()
    merge_state_in_place(*got, o[:, 1], lse[:, 1], mask=mask)
    kept = torch.zeros(50, dtype=torch.bool) if mask is None else mask.cpu() == 0
    for mine, before, merged in zip(got, (o[:, 0], lse[:, 0]), expected(o, lse)):
        assert torch.equal(mine.cpu()[kept], before.cpu()[kept])
        reference.assert_close(mine.cpu()[~kept], merged[~kept], torch.float16)


@pytest.mark.parametrize("count", [2, 6])
def test_what_a_unit_holds_never_counts(device: str, count: int) -> None:
    o, lse = states(5, count, 2, 64, dtype=torch.float32, device=device)
    want = expected(o, lse)
    o[lse.isinf()] = math.nan
    check(merge_states(o, lse), want, torch.float32)
    check(merge_states(o.flip(1), lse.flip(1)), want, torch.float32)


def test_all_units_give_the_unit(device: str) -> None:
    o = torch.full((3, 2, 4, 64), math.nan, device=device)
    lse = torch.full((3, 2, 4), -math.inf, device=device)
    merged, total = merge_states(o, lse)
    assert torch.equal(merged.cpu(), torch.zeros(3, 4, 64))
    assert torch.equal(total.cpu(), torch.full((3, 4), -math.inf))


def test_a_nan_is_not_lost(device: str) -> None:
    o, lse = states(4, 3, 1, 64, dtype=torch.float32, device=device)
    lse[1] = torch.tensor([-math.inf, math.nan, -math.inf], device=device)[:, None]
    lse[2, 0] = math.nan
    merged, total = merge_states(o, lse)
    assert merged.cpu()[1:3].isnan().all()
    assert total.cpu()[1:3].isnan().all()
    assert not merged.cpu()[[0, 3]].isnan().any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logarithms(device: str, scale: float) -> None:
    """Sums of exponents like these overflow or vanish; their differences do not."""
    o, lse = states(6, 3, 2, 64, dtype=torch.float32, device=device)
    lse = lse + scale
    merged, total = merge_states(o, lse)
    want, want_lse = expected(o, lse)
    reference.assert_close(merged.cpu(), want, torch.float32)
    torch.testing.assert_close(total.cpu().double(), want_lse, rtol=2.0**-22, atol=0)


def check_ragged(counts: List[int], device: str, seed: int = 0) -> None:
    o, lse = states(1, sum(counts) + 2, 3, 40, dtype=torch.float16, device=device, seed=seed)
    o, lse, indptr = o[0], lse[0], indptr_of(counts)
    o[-2:], lse[-2:] = math.nan, math.nan  # belong to no row
    out = poisoned((len(counts), 3, 40), torch.float16, device)
    total = poisoned((len(counts), 3), torch.float32, device)
    merge_ragged_states(o, lse, indptr.to(device), out=out, lse_out=total)
    for row, (begin, end) in enumerate(zip(indptr.tolist(), indptr.tolist()[1:])):
        want = expected(o[None, begin:end], lse[None, begin:end])
        check((out[row], total[row]), (want[0][0], want[1][0]), torch.float16)


@pytest.mark.parametrize("counts", [[], [0], [1], [0, 3, 0, 1, 9, 0], [2] * 40], ids=lambda counts: f"{len(counts)}")
def test_variably_many_states(device: str, counts: List[int]) -> None:
    check_ragged(counts, device)


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 12), max_size=20), seed=st.integers(0, 9))
def test_any_number_of_states(counts: List[int], seed: int) -> None:
    check_ragged(counts, "cpu", seed)


LSES = st.one_of(st.floats(-30, 30, width=32), st.just(-math.inf))


def one_row(lse: float, seed: int) -> State:
    o = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(seed))
    return o * (lse > -math.inf), torch.full((1, 1), lse)


@settings(deadline=None, max_examples=60)
@given(lses=st.tuples(LSES, LSES, LSES))
def test_the_algebra(lses: Tuple[float, float, float]) -> None:
    """Associative and commutative, with unit (0, -inf)."""
    a, b, c = (one_row(lse, seed) for seed, lse in enumerate(lses))
    left = merge_state(*merge_state(*a, *b), *c)
    right = merge_state(*a, *merge_state(*b, *c))
    check(left, (right[0].double(), right[1].double()), torch.float32)
    swapped = merge_state(*b, *a)
    for one, other in zip(merge_state(*a, *b), swapped):
        torch.testing.assert_close(one, other, rtol=2.0**-21, atol=2.0**-21)
    unit = torch.full((1, 1, 8), math.nan), torch.full((1, 1), -math.inf)
    for one, other in zip(merge_state(*a, *unit), a):
        assert torch.equal(one, other)
    for one, other in zip(merge_state(*unit, *a), a):
        assert torch.equal(one, other)


def test_halves_of_attention_merge_to_the_whole(device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, 64) for n, heads in [(7, 6), (90, 2), (90, 2)])
    parts = [reference.attention(q, k[part], v[part]) for part in (slice(0, 31), slice(31, 90))]
    (o_a, lse_a), (o_b, lse_b) = ((o.float().to(device), lse.float().to(device)) for o, lse in parts)
    check(merge_state(o_a, lse_a, o_b, lse_b), reference.attention(q, k, v), torch.float32)


def test_no_rows(device: str) -> None:
    merged, lse = merge_states(torch.empty(0, 2, 4, 64, device=device), torch.empty(0, 2, 4, device=device))
    assert merged.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


@pytest.mark.usefixtures("no_launch")
def test_what_is_refused() -> None:
    o, lse = states(3, 2, 4, 64, dtype=torch.float16, device="cpu")
    a, lse_a = o[:, 0], lse[:, 0]
    with pytest.raises(InvalidArgumentError, match=r"o_b must have shape \[3, 4, 64\]"):
        merge_state(a, lse_a, a[:2], lse_a)
    with pytest.raises(InvalidArgumentError, match=r"lse_b must have shape \[3, 4\]"):
        merge_state(a, lse_a, a, lse_a.t())
    with pytest.raises(InvalidTypeError, match=r"o_b must be torch.float16, got torch.float32"):
        merge_state(a, lse_a, a.float(), lse_a)
    with pytest.raises(InvalidTypeError, match=r"lse_a must be torch.float32"):
        merge_state(a, lse_a.double(), a, lse_a)
    with pytest.raises(InvalidArgumentError, match="last dimension of o_a must be contiguous"):
        merge_state(a.transpose(1, 2).contiguous().transpose(1, 2), lse_a, a, lse_a)
    with pytest.raises(UnsupportedOptionError, match="head_dim=60"):
        merge_state(a[..., :60], lse_a, a[..., :60], lse_a)
    with pytest.raises(UnsupportedOptionError, match=r"dtype=torch.float64"):
        merge_state(a.double(), lse_a, a.double(), lse_a)
    with pytest.raises(InvalidTypeError, match="mask must be bool or uint8"):
        merge_state_in_place(a, lse_a, a, lse_a, mask=torch.ones(3))
    with pytest.raises(InvalidTypeError, match=r"indptr must be torch\.int32"):
        merge_ragged_states(a, lse_a, torch.tensor([0, 3]))
    with pytest.raises(InvalidArgumentError, match="elements of out share memory"):
        merge_state(a, lse_a, a, lse_a, out=a[:1].expand(3, 4, 64))
    with pytest.raises(InvalidArgumentError, match="elements of lse share memory"):
        merge_state_in_place(a, lse_a[:1].expand(3, 4), a, lse_a)
    with pytest.raises(InvalidArgumentError, match="one element more than there are rows"):
        merge_ragged_states(a, lse_a, torch.empty(0, dtype=torch.int32))


@pytest.mark.parametrize("target", list(TARGETS))
def test_choose_picks_what_ships(target: str) -> None:
    shipped = variants.shipped(target)
    for dtype in DTYPES:
        if dtype == "bf16" and target.endswith("_75"):
            continue
        for sum_dtype in (dtype, "f32"):
            for aligned, states_of_row in itertools.product((True, False), range(12)):
                one = variants.choose_states(
                    target, dtype=dtype, sum_dtype=sum_dtype, aligned=aligned, states=states_of_row
                )
                assert one in shipped
