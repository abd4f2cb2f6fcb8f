"""Every option, alone, with every other and all at once, through the native operators, against fp64.

What a target cannot do yet must be refused by name; `support.py` has the table of it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Tuple

import pytest
import torch

from batches import DTYPES, Paged
from calls import KINDS, LENGTHS, Call, add_option, check, dtypes_on
from flashinfer_attention.support import FP8_ELEMENTS
from flashinfer_attention.variants import SUPPORT

NAMES = (
    "causal",
    "window",
    "mask",
    "soft-cap",
    "alibi",
    "rope",
    "sinks",
    "float-scales",
    "q-tensor",
    "k-heads",
    "v-heads",
)
SETS = [*((name,) for name in NAMES), *itertools.combinations(NAMES, 2), NAMES[1:]]


@pytest.mark.parametrize("names", SETS, ids=lambda names: "+".join(names) if len(names) < 4 else "all")
@pytest.mark.parametrize("kind", KINDS)
def test_pairs(device: str, kind: str, names: Tuple[str, ...]) -> None:
    turn = SETS.index(names)  # dtypes, shapes and layouts take turns
    dtypes = dtypes_on(device)
    batch = Paged(
        *LENGTHS[kind],
        heads=(4, 6, 8)[turn % 3],
        kv_heads=2,
        dim=(64, 128)[turn % 2],
        page_size=(16, 1, 5)[turn // 2 % 3],
        dtype=dtypes[turn % len(dtypes)],
        layout=("NHD", "HND")[turn // 3 % 2],
        device=device,
        poison=(math.nan, math.inf)[turn // 5 % 2],
    )
    call = Call()
    for name in names:
        add_option(call, name, batch)
    check(kind, batch, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("names", [("causal",), NAMES[1:]], ids=["plain", "all"])
def test_dtypes(device: str, dtype: torch.dtype, kind: str, names: Tuple[str, ...]) -> None:
    if dtype not in dtypes_on(device):
        pytest.skip("GPUs have no fp32 attention")
    batch = Paged(*LENGTHS[kind], dtype=dtype, device=device)
    call = Call()
    for name in names:
        add_option(call, name, batch)
    check(kind, batch, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_dtype", FP8_ELEMENTS, ids=FP8_ELEMENTS.values())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128, (192, 128), 256], ids=str)
def test_fp8(device: str, dtype: torch.dtype, kv_dtype: torch.dtype, dim: Any, kind: str) -> None:
    dim, dim_vo = dim if isinstance(dim, tuple) else (dim, dim)
    batch = Paged(*LENGTHS[kind], dim=dim, dim_vo=dim_vo, dtype=dtype, kv_dtype=kv_dtype, device=device)
    call = Call(["fp8", *(["head_dim_vo"] if dim != dim_vo else [])])
    add_option(call, "causal", batch)
    add_option(call, "k-heads", batch)
    add_option(call, "v-heads", batch)
    check(kind, batch, call)


DIMS = [8, 24, 64, 72, 80, 96, 120, 128, 192, 224, 256, 320, 512, (192, 128), (64, 128), (128, 40), (512, 64)]


@pytest.mark.parametrize("names", [("causal",), ("causal", "rope", "soft-cap")], ids=["plain", "rope-soft-cap"])
@pytest.mark.parametrize("kind", ["decode", "ragged"])
@pytest.mark.parametrize("dim", DIMS, ids=str)
def test_head_dims(device: str, dim: Any, kind: str, names: Tuple[str, ...]) -> None:
    dim, dim_vo = dim if isinstance(dim, tuple) else (dim, dim)
    batch = Paged(*LENGTHS[kind], dim=dim, dim_vo=dim_vo, device=device)
    call = Call(["head_dim_vo"] if dim != dim_vo else [])
    for name in names:
        add_option(call, name, batch)
    if not {dim, dim_vo} <= set(SUPPORT["cpu" if device == "cpu" else "cuda"].head_dims):
        call.wants.append("a head_dim that is not there")
    check(kind, batch, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 3, 12, 71])
def test_alibi_slopes(device: str, heads: int, kind: str) -> None:
    batch = Paged(*LENGTHS[kind], heads=heads, kv_heads=1, device=device)
    call = Call()
    add_option(call, "alibi", batch)
    check(kind, batch, call)
