"""Packing of booleans, against numpy's."""

from __future__ import annotations

import itertools
from typing import Any, List

import numpy as np
import pytest
import torch

import flashinfer
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError

ORDERS = pytest.mark.parametrize("order", ["big", "little"])


def booleans(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5


def packed(x: torch.Tensor, order: Any) -> List[int]:
    return np.packbits(x.numpy(), bitorder=order).tolist()


@ORDERS
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packbits(device: str, count: int, order: str) -> None:
    x = booleans(count)
    got = flashinfer.packbits(x.to(device), order)
    assert got.dtype == torch.uint8
    assert got.tolist() == packed(x, order)


@ORDERS
@pytest.mark.parametrize("lengths", [[], [0], [3], [8, 0, 1, 17, 64, 0], [5] * 100], ids=len)
def test_segments(device: str, lengths: List[int], order: str) -> None:
    parts = [booleans(length, seed) for seed, length in enumerate(lengths)]
    x = torch.cat([torch.zeros(0, dtype=torch.bool), *parts])
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    got, begins = flashinfer.segment_packbits(x.to(device), indptr.to(device), order)
    expected = [packed(part, order) for part in parts]
    assert got.tolist() == [*itertools.chain(*expected)]
    assert begins.dtype == torch.int32
    assert begins.tolist() == [0, *np.cumsum([len(part) for part in expected]).tolist()]


def test_what_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"x must be torch\.bool"):
        flashinfer.packbits(torch.zeros(8))
    with pytest.raises(InvalidArgumentError, match="bitorder must be 'big' or 'little', got 'middle'"):
        flashinfer.packbits(booleans(8), "middle")
    with pytest.raises(InvalidTypeError, match=r"indptr must be torch\.int32"):
        flashinfer.segment_packbits(booleans(8), torch.tensor([0, 8]))
