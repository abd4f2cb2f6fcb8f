"""Options through the compatible interface: what FlashInfer's arguments mean, against fp64."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Tuple

import pytest
import torch

import flashinfer
import reference
from batches import Paged, poisoned
from calls import LENGTHS, Call, lacks, masks_of, packed, ragged_rows
from flashinfer_core.errors import InvalidArgumentError, UnsupportedOptionError, WorkspaceError

HEADS = torch.tensor([0.5, 2.0])
# Arguments of plan (or of a single call), of run, what the table calls them, and what the reference calls them.
OPTIONS: Dict[str, Tuple[Dict[str, Any], Dict[str, Any], List[str], Dict[str, Any]]] = {
    "window": ({"window_left": 11}, {}, ["window_left"], {"window_left": 11}),
    "soft-cap": ({"logits_soft_cap": 1.5}, {}, ["logits_soft_cap"], {"logits_soft_cap": 1.5}),
    "alibi": ({"pos_encoding_mode": "ALIBI"}, {}, ["alibi"], {"alibi": True}),
    "rope": ({"pos_encoding_mode": "ROPE_LLAMA"}, {}, ["rope"], {"rope": True}),
    "rope-scaled": (
        {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 4.0, "rope_theta": 5e5},
        {},
        ["rope"],
        {"rope": True, "rope_scale": 4.0, "rope_theta": 5e5},
    ),
    "sm-scale": ({"sm_scale": 0.3}, {}, [], {"sm_scale": 0.3}),
    "k-scale": ({}, {"k_scale": 0.5}, [], {"k_scale": 0.5}),
    "v-scale": ({}, {"v_scale": 1.5}, ["v_scale"], {"v_scale": 1.5}),
    "v-scale-1": ({}, {"v_scale": torch.tensor(1.0)}, [], {}),
    "k-scale-heads": (
        {},
        {"k_scale": torch.tensor([0.5, 2.0])},
        ["scale_tensors"],
        {"k_scale": torch.tensor([0.5, 2.0])},
    ),
}
EACH = pytest.mark.parametrize("name", OPTIONS)


def workspace(device: str) -> torch.Tensor:
    return torch.empty(1 << 20, dtype=torch.uint8, device=device)


def on(device: str, options: Dict[str, Any]) -> Dict[str, Any]:
    """Move tensors with dimensions; a scalar stays on the CPU, as a checkpoint's does."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in options.items()
    }


def planned(kind: str, batch: Paged, **options: Any) -> Any:
    """Return the wrapper of this kind with a plan, its run without the last arguments."""
    shape = (batch.heads, batch.kv_heads, batch.dim)
    types: Dict[str, Any] = {"q_data_type": batch.dtype, "kv_data_type": batch.kv_dtype}
    table = (batch.indptr, batch.indices, batch.last_page_len)
    if kind == "decode":
        decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(batch.device), batch.layout)
        decode.plan(*table, *shape, batch.page_size, **types, **options)
        return decode, (batch.q, batch.pair)
    if kind == "paged":
        paged: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(batch.device), batch.layout)
        paged.plan(batch.q_indptr, *table, *shape, batch.page_size, batch.dim_vo, **types, **options)
        return paged, (batch.q, batch.pair)
    k, v, kv_indptr = ragged_rows(batch, spare=3)
    ragged: Any = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(batch.device))
    ragged.plan(batch.q_indptr, kv_indptr, *shape, batch.dim_vo, **types, **options)
    return ragged, (batch.q, k, v)


def refused(batch: Paged, wants: List[str], call: Any) -> bool:
    if not lacks(batch, Call(wants)):
        return False
    with pytest.raises(UnsupportedOptionError):
        call()
    return True


@EACH
@pytest.mark.parametrize("style", ["run", "forward"])
@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_wrappers(device: str, kind: str, style: str, name: str) -> None:
    batch = Paged(*LENGTHS[kind], device=device)
    plan, run, wants, expected = OPTIONS[name]
    run = on(device, run)
    if kind == "ragged" and run:
        pytest.skip("run of ragged keys takes no scales")
    rounded = batch.dtype if "rope" in wants else torch.float32
    causal = {} if kind == "decode" else {"causal": True}

    def call() -> Any:
        if style == "run":
            wrapper, inputs = planned(kind, batch, **plan, **causal)
            return wrapper.run_return_lse(*inputs, **run)
        wrapper, inputs = planned(kind, batch)  # and forward plans again what it must
        return wrapper.forward_return_lse(*inputs, **plan, **run, **causal)

    if refused(batch, wants, call):
        return
    o, lse = call()
    batch.check(o, lse, causal=kind != "decode", rounded=rounded, **expected)


@pytest.mark.parametrize("form", ["bool", "packed", "both"])
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_masks(device: str, kind: str, form: str) -> None:
    batch = Paged(*LENGTHS[kind], device=device)
    masks = masks_of(batch, seed=1)
    flat = torch.cat([mask.flatten() for mask in masks]).to(device)
    given = {"custom_mask": flat if form == "bool" else ~flat, "packed_custom_mask": packed(masks)[0].to(device)}
    for name in {"bool": ["packed_custom_mask"], "packed": ["custom_mask"]}.get(form, []):
        del given[name]
    if refused(batch, ["mask"], lambda: planned(kind, batch, **given)):
        return
    wrapper, inputs = planned(kind, batch, causal=True, **given)  # the mask takes the place of causal
    batch.check(*wrapper.run_return_lse(*inputs), masks=masks)
    batch.check(*wrapper.forward_return_lse(*inputs, causal=True), masks=masks)
    for tensor in given.values():
        tensor.zero_()  # the plan has a copy
    batch.check(*wrapper.run_return_lse(*inputs), masks=masks)


def test_a_mask_is_gone_with_the_next_plan(device: str) -> None:
    batch = Paged([3], [9], device=device)
    mask = torch.zeros(27, dtype=torch.bool, device=device)
    if refused(batch, ["mask"], lambda: planned("paged", batch, custom_mask=mask)):
        return
    wrapper, inputs = planned("paged", batch, custom_mask=mask)
    assert wrapper.run(*inputs).eq(0).all()
    tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
    wrapper.plan(*tables, batch.heads, batch.kv_heads, batch.dim, batch.page_size)
    batch.check(*wrapper.run_return_lse(*inputs))


def test_masks_in_the_buffers_of_a_graph(device: str) -> None:
    first = Paged([3, 20], [40, 30], device=device)
    if lacks(first, Call(["mask"])):
        pytest.skip("no masks there yet")
    buffers: List[Any] = [torch.zeros(n, dtype=torch.int32, device=device) for n in (3, 3, 20, 2)]
    bits = torch.zeros(100, dtype=torch.uint8, device=device)
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    make: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    wrapper = make(workspace(device), "NHD", True, *buffers, bits, starts)
    for batch in (first, Paged([20, 3], [30, 40], device=device, seed=2)):
        masks = masks_of(batch, seed=1)
        tables = (batch.q_indptr, batch.indptr, batch.indices, batch.last_page_len)
        shape = (batch.heads, batch.kv_heads, batch.dim, batch.page_size)
        wrapper.plan(*tables, *shape, custom_mask=torch.cat([mask.flatten() for mask in masks]).to(device))
        batch.check(*wrapper.run_return_lse(batch.q, batch.cache), masks=masks)
        assert starts.tolist() == packed(masks)[1].tolist()
    large = Paged([20, 20], [40, 40], device=device)
    tables = (large.q_indptr, large.indptr, large.indices, large.last_page_len)
    with pytest.raises(WorkspaceError, match="masks need 200 bytes, but custom_mask_buf has 100"):
        wrapper.plan(*tables, *shape, custom_mask=torch.ones(1600, dtype=torch.bool, device=device))


def test_graph_masks_need_both_buffers(device: str) -> None:
    buffers = [torch.zeros(n, dtype=torch.int32, device=device) for n in (3, 3, 20, 2)]
    make: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    bits = torch.zeros(100, dtype=torch.uint8, device=device)
    with pytest.raises(InvalidArgumentError, match="needs mask_indptr_buf"):
        make(workspace(device), "NHD", True, *buffers, custom_mask_buf=bits)
    with pytest.raises(InvalidArgumentError, match="custom_mask_buf is missing"):
        make(workspace(device), "NHD", True, *buffers, mask_indptr_buf=buffers[0])


@EACH
def test_single_prefill(device: str, name: str) -> None:
    batch = Paged([33], [130], device=device)
    plan, run, wants, expected = OPTIONS[name]
    if run:
        pytest.skip("it takes no scales")
    k, v, _ = ragged_rows(batch, spare=0)

    def call() -> Any:
        return flashinfer.single_prefill_with_kv_cache_return_lse(batch.q, k, v, causal=True, **plan)

    if not refused(batch, wants, call):
        rounded = batch.dtype if "rope" in wants else torch.float32
        batch.check(*call(), causal=True, rounded=rounded, **expected)


@EACH
def test_single_decode(device: str, name: str) -> None:
    batch = Paged([1], [130], device=device)
    plan, run, wants, expected = OPTIONS[name]
    k, v, _ = ragged_rows(batch, spare=0)

    def call() -> Any:
        return flashinfer.single_decode_with_kv_cache(batch.q[0], k, v, **plan, **on(device, run))

    if not refused(batch, wants, call):
        reference.assert_close(call()[None].cpu(), batch.expected(**expected)[0], batch.dtype)


@pytest.mark.parametrize("form", ["bool", "packed"])
def test_single_masks(device: str, form: str) -> None:
    batch = Paged([9], [33], device=device)
    masks = masks_of(batch, seed=1)
    k, v, _ = ragged_rows(batch, spare=0)
    bits = flashinfer.quantization.packbits(masks[0].flatten(), "little")
    given: Dict[str, Any] = (
        {"custom_mask": masks[0].to(device)} if form == "bool" else {"packed_custom_mask": bits.to(device)}
    )

    def call() -> Any:
        return flashinfer.single_prefill_with_kv_cache_return_lse(batch.q, k, v, causal=True, **given)

    if not refused(batch, ["mask"], call):
        batch.check(*call(), masks=masks)


@pytest.mark.parametrize("types", [{"kv_data_type": "float8_e5m2"}, {"data_type": torch.float8_e5m2}], ids=str)
def test_ways_to_name_fp8_keys(device: str, types: Dict[str, Any]) -> None:
    batch = Paged([1, 1], [40, 7], kv_dtype=torch.float8_e5m2, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    tables = (batch.indptr, batch.indices, batch.last_page_len)

    def call() -> None:
        wrapper.plan(*tables, batch.heads, batch.kv_heads, batch.dim, batch.page_size, **types)

    if not refused(batch, ["fp8"], call):
        call()
        batch.check(*wrapper.run_return_lse(batch.q, batch.cache))


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_values_of_another_width(device: str, kind: str) -> None:
    batch = Paged(*LENGTHS[kind], dim=192, dim_vo=128, device=device)
    if refused(batch, ["head_dim_vo"], lambda: planned(kind, batch)):
        return
    wrapper, inputs = planned(kind, batch, causal=True)
    out = poisoned((batch.q.shape[0], batch.heads, 128), batch.dtype, device)
    o, lse = wrapper.run(*inputs, out=out, return_lse=True)
    assert o is out
    batch.check(o, lse, causal=True)


def test_forward_sets_all_scalars_anew(device: str) -> None:
    batch = Paged([3, 1], [40, 7], device=device)
    wrapper, inputs = planned("paged", batch, sm_scale=0.7)
    batch.check(*wrapper.forward_return_lse(*inputs, causal=True, sm_scale=0.4), causal=True, sm_scale=0.4)
    batch.check(*wrapper.run_return_lse(*inputs), causal=True, sm_scale=0.4)
    batch.check(*wrapper.forward_return_lse(*inputs))
    assert wrapper._sm_scale is None
    assert not wrapper._causal


def test_a_plan_keeps_its_page_table(device: str) -> None:
    batch = Paged([1, 1], [40, 7], device=device)
    batch.indices = batch.indices.to(device)
    wrapper, inputs = planned("decode", batch)
    expected = wrapper.run(*inputs)
    batch.indices.zero_()
    assert torch.equal(wrapper.run(*inputs), expected)


def test_keys_and_values_of_different_strides(device: str) -> None:
    batch = Paged([1, 1], [40, 7], device=device)
    wrapper, _ = planned("decode", batch)
    k, v = batch.pair
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert v.stride() != k.stride()
    o, lse = wrapper.run_return_lse(batch.q, (k, v))
    batch.check(o, lse)
    assert math.isfinite(float(lse.max()))
