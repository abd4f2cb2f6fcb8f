"""Calls of the native operators with options, over one batch, and what fp64 makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
import torch

import reference
from batches import DTYPES, Paged, indptr_of, poisoned
from flashinfer_attention import attention, plan_attention, single
from flashinfer_attention.variants import SUPPORT
from flashinfer_core.errors import UnsupportedOptionError
from flashinfer_core.tensors import lacks_bfloat16

KINDS = ("decode", "paged", "ragged", "single")
LENGTHS: Dict[str, Tuple[List[int], List[int]]] = {
    "decode": ([1, 1, 1, 1], [300, 0, 17, 1]),
    "paged": ([40, 0, 3, 1], [90, 20, 2, 0]),  # with more queries than keys, no query, no key
    "ragged": ([40, 0, 3, 1], [90, 20, 2, 0]),
    "single": ([33], [130]),
}


@dataclass
class Call:
    """Arguments of one call: of its plan, of the call itself, and of the reference."""

    wants: List[str] = field(default_factory=list)
    plan: Dict[str, Any] = field(default_factory=dict)
    run: Dict[str, Any] = field(default_factory=dict)
    expected: Dict[str, Any] = field(default_factory=dict)

    def add(self, wants: Optional[str], **options: Any) -> None:
        """Set options that the call and the reference spell alike; `wants` is their name in the table."""
        self.wants.extend([wants] if wants else [])
        self.run.update(options)
        self.expected.update(options)


def masks_of(batch: Paged, seed: int) -> List[torch.Tensor]:
    """Return a mask for each request, the first row of which is wholly masked where there is more than one."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(q, k, generator=generator) < 0.6 for q, k in zip(batch.q_lens, batch.kv_lens)]
    for mask in masks:
        mask[: int(mask.shape[0] > 1)] = False
    return masks


def packed(masks: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the bits of all masks, lowest first and each from a byte of its own, and where they begin."""
    parts = [torch.from_numpy(np.packbits(mask.flatten().numpy(), bitorder="little")) for mask in masks]
    return torch.cat(parts), indptr_of([part.numel() for part in parts])


def add_option(call: Call, name: str, batch: Paged) -> None:
    device = batch.device
    heads = torch.linspace(0.5, 1.5, batch.kv_heads, device=device)
    simple: Dict[str, Tuple[Optional[str], Dict[str, Any]]] = {
        "soft-cap": ("logits_soft_cap", {"logits_soft_cap": 1.5}),
        "alibi": ("alibi", {"alibi": True}),
        "rope": ("rope", {"rope": True, "rope_scale": 2.0, "rope_theta": 5e5}),
        "sinks": ("sinks", {"sinks": torch.linspace(-2, 3, batch.heads, device=device)}),
        "float-scales": ("v_scale", {"q_scale": 1.5, "k_scale": 0.7, "v_scale": 1.3}),
        "q-tensor": ("scale_tensors", {"q_scale": torch.tensor([1.5], device=device)}),
        "k-heads": ("scale_tensors", {"k_scale": heads}),
        "v-heads": ("scale_tensors", {"v_scale": heads}),
        "sm-scale": (None, {"sm_scale": 0.3}),
    }
    if name in simple:
        wants, options = simple[name]
        call.add(wants, **options)
    elif name == "causal":
        call.plan["causal"] = call.expected["causal"] = True
    elif name == "window":
        call.wants.append("window_left")
        call.plan["window_left"] = call.expected["window_left"] = 11
    else:
        masks = masks_of(batch, seed=3)
        call.wants.append("mask")
        call.plan["has_mask"] = True
        call.expected["masks"] = masks
        call.run["mask"], call.run["mask_indptr"] = (t.to(device) for t in packed(masks))


def native(kind: str, batch: Paged, call: Call) -> Tuple[torch.Tensor, torch.Tensor]:
    """Run one of the native operators into poisoned outputs."""
    tokens, dim_vo = batch.q.shape[0], batch.dim if batch.dim_vo is None else batch.dim_vo
    out = poisoned((tokens, batch.heads, dim_vo), batch.dtype, batch.device)
    lse = poisoned((tokens, batch.heads), torch.float32, batch.device)
    if kind == "single":
        k, v, _ = ragged_rows(batch, spare=0)
        options = {name: value for name, value in call.run.items() if name != "mask_indptr"}
        plan = {name: value for name, value in call.plan.items() if name != "has_mask"}
        return single(batch.q, k, v, out=out, lse=lse, **plan, **options)
    k, v, kv_indptr = (batch.k, batch.v, batch.indptr) if kind != "ragged" else ragged_rows(batch, spare=3)
    planned = plan_attention(
        q_indptr=batch.q_indptr,
        kv_indptr=kv_indptr,
        kv_len=batch.kv_len,
        num_qo_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        head_dim=batch.dim,
        head_dim_vo=dim_vo,
        page_size=None if kind == "ragged" else batch.page_size,
        dtype=batch.dtype,
        kv_dtype=batch.kv_dtype,
        device=batch.device,
        **call.plan,
    )
    table = None if kind == "ragged" else batch.indices.to(batch.device)
    return attention(batch.q, k, v, plan=planned, page_table=table, out=out, lse=lse, **call.run)


def ragged_rows(batch: Paged, spare: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return k, v and kv_indptr of the same keys end to end, with poisoned rows behind."""
    dtype = batch.dtype if batch.kv_dtype is None else batch.kv_dtype
    both = []
    for cache in (batch.k, batch.v):
        rows = torch.cat(batch.rows(cache))
        tail = rows.new_full((spare, *rows.shape[1:]), batch.poison)
        both.append(torch.cat([rows, tail]).to(dtype).to(batch.device))
    return both[0], both[1], indptr_of(batch.kv_lens)


def check(kind: str, batch: Paged, call: Call) -> None:
    """Assert that the result is that of fp64, or that the first thing which is missing is refused."""
    if lacks(batch, call):
        with pytest.raises(UnsupportedOptionError):
            native(kind, batch, call)
        return
    o, lse = native(kind, batch, call)
    expected_o, expected_lse = batch.expected(**call.expected)
    reference.assert_close(o.cpu(), expected_o, batch.dtype)
    rounded = batch.dtype if call.run.get("rope") else torch.float32
    reference.assert_lse_close(lse.cpu(), expected_lse, rounded)


def dtypes_on(device: str) -> List[torch.dtype]:
    known = SUPPORT["cpu" if device == "cpu" else "cuda"].dtypes
    lacking = ("bf16",) if device != "cpu" and lacks_bfloat16(torch.device(device, 0)) else ()
    return [dtype for name, dtype in DTYPES.items() if name in known and name not in lacking]


def lacks(batch: Paged, call: Call) -> bool:
    """Say whether the batch's device has no kernel for what the call wants."""
    # 64 rows of 256 columns, or 16 of 512, and a step of keys are all that sm_75 holds: no room for turns.
    crowded = batch.dim > (192 if max(batch.q_lens) * batch.heads // batch.kv_heads > 16 else 256)
    if batch.device != "cpu" and "rope" in call.wants and crowded and lacks_bfloat16(torch.device(batch.device, 0)):
        return True
    return not set(call.wants) <= SUPPORT["cpu" if batch.device == "cpu" else "cuda"].options
