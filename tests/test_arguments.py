"""Bad input: a typed error that names it, and nothing launched."""

from __future__ import annotations

import functools
import re
from typing import Any, Callable, Dict, List, Tuple, Type

import pytest
import torch

import flashinfer
from batches import HUGE, Paged
from flashinfer_attention import attention, plan_attention, single, variants
from flashinfer_attention import support as table
from flashinfer_attention.checks import make_problem
from flashinfer_core.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedDeviceError,
    UnsupportedOptionError,
)

Change = Callable[[Dict[str, Any]], None]


pytestmark = pytest.mark.usefixtures("no_launch", "every_option")


@pytest.fixture
def every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be refused for want of a kernel: none is launched here."""
    for kind, support in variants.SUPPORT.items():
        monkeypatch.setitem(variants.SUPPORT, kind, support._replace(options=frozenset(table.OPTIONS)))


def batch(device: str = "cpu") -> Paged:
    return Paged([3, 1], [40, 20], device=device)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def workspace(size: int = 1 << 20, device: str = "cpu") -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def prefill_plan(device: str = "cpu", **changes: Any) -> flashinfer.BatchPrefillWithPagedKVCacheWrapper:
    b = batch(device)
    arguments: Dict[str, Any] = {
        "qo_indptr": b.q_indptr,
        "paged_kv_indptr": b.indptr,
        "paged_kv_indices": b.indices,
        "paged_kv_last_page_len": b.last_page_len,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "page_size": 16,
    }
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device=device))
    wrapper.plan(**{**arguments, **changes})
    return wrapper


BAD_PLANS = {
    "heads-that-do-not-divide": ({"num_qo_heads": 5}, InvalidArgumentError, "num_qo_heads.*5 and 2"),
    "no-kv-heads": ({"num_kv_heads": 0}, InvalidArgumentError, "num_kv_heads"),
    "q-indptr-decreases": ({"qo_indptr": ints(0, 4, 3)}, InvalidArgumentError, "q_indptr must not decrease"),
    "q-indptr-from-1": (
        {"qo_indptr": ints(1, 3, 4)},
        InvalidArgumentError,
        r"q_indptr\[0\] must be 0, got 1: the rows of q before it would belong to no request",
    ),
    "q-indptr-int64": ({"qo_indptr": torch.tensor([0, 3, 4])}, InvalidTypeError, "q_indptr must be torch.int32"),
    "q-indptr-empty": ({"qo_indptr": ints()}, InvalidArgumentError, "q_indptr"),
    "q-indptr-too-long": ({"qo_indptr": ints(0, 3, 4, 4)}, InvalidArgumentError, "kv_indptr.*shape"),
    "q-indptr-matrix": ({"qo_indptr": ints(0, 3, 4)[None]}, InvalidArgumentError, "q_indptr must have 1 dim"),
    "q-indptr-list": ({"qo_indptr": [0, 3, 4]}, InvalidTypeError, "q_indptr must be a torch.Tensor"),
    "indptr-decreases": ({"paged_kv_indptr": ints(0, 3, 2)}, InvalidArgumentError, "indptr"),
    "indptr-int64": ({"paged_kv_indptr": torch.tensor([0, 3, 5])}, InvalidTypeError, "indptr must be torch.int32"),
    "last-page-len-int64": ({"paged_kv_last_page_len": torch.tensor([8, 4])}, InvalidTypeError, "last_page_len"),
    "last-page-len-too-short": ({"paged_kv_last_page_len": ints(8)}, InvalidArgumentError, "last_page_len.*shape"),
    "last-page-empty": ({"paged_kv_last_page_len": ints(8, 0)}, InvalidArgumentError, r"last_page_len\[1\].*got 0"),
    "last-page-overfull": ({"paged_kv_last_page_len": ints(17, 1)}, InvalidArgumentError, r"last_page_len\[0\].*17"),
    "indices-too-short": ({"paged_kv_indices": ints(0, 1)}, InvalidArgumentError, "names 5 pages.*2"),
    "indices-int64": ({"paged_kv_indices": torch.arange(9)}, InvalidTypeError, "indices must be torch.int32"),
    "page-size-0": ({"page_size": 0}, InvalidArgumentError, "page_size"),
    "page-size-2^31": ({"page_size": 2**31}, InvalidArgumentError, "page_size"),
    "page-size-float": ({"page_size": 16.0}, InvalidTypeError, "page_size must be an integer, got 16.0"),
    "head-dim-60": ({"head_dim_qk": 60}, UnsupportedOptionError, "head_dim=60.*nearest is (56|64)"),
    "head-dim-520": ({"head_dim_qk": 520}, UnsupportedOptionError, "head_dim=520.*nearest is (256|512)"),
    "head-dim-0": ({"head_dim_qk": 0}, UnsupportedOptionError, "head_dim=0"),
    "head-dim-float": ({"head_dim_qk": 64.0}, InvalidTypeError, "head_dim must be an integer, got 64.0"),
    "heads-float": ({"num_qo_heads": 4.0}, InvalidTypeError, "num_qo_heads must be an integer"),
    "window-left-none": ({"window_left": None}, InvalidTypeError, "window_left must be an integer, got None"),
    "q-indptr-meta": ({"qo_indptr": ints(0, 3, 4).to("meta")}, InvalidArgumentError, "q_indptr must be on a CPU or"),
    "indptr-meta": ({"paged_kv_indptr": ints(0, 3, 5).to("meta")}, InvalidArgumentError, "kv_indptr must be on a CPU"),
    "last-page-len-meta": ({"paged_kv_last_page_len": ints(8, 4).to("meta")}, InvalidArgumentError, "last_page_len"),
    "indices-meta": ({"paged_kv_indices": ints(0, 1, 2, 3, 4).to("meta")}, InvalidArgumentError, "paged_kv_indices"),
    "sm-scale-0": ({"sm_scale": 0.0}, InvalidArgumentError, "sm_scale must be finite and greater than 0, got 0.0"),
    "sm-scale-negative": ({"sm_scale": -0.1}, InvalidArgumentError, "sm_scale.*got -0.1"),
    "sm-scale-nan": ({"sm_scale": float("nan")}, InvalidArgumentError, "sm_scale.*got nan"),
    "sm-scale-infinite": ({"sm_scale": float("inf")}, InvalidArgumentError, "sm_scale.*got inf"),
    "sm-scale-beyond-float32": ({"sm_scale": 1e-50}, InvalidArgumentError, "sm_scale"),
    "sm-scale-text": ({"sm_scale": "0.1"}, InvalidTypeError, "sm_scale must be a number, got str"),
    "dtype-int8": ({"q_data_type": torch.int8}, UnsupportedOptionError, "dtype=torch.int8"),
    "dtype-unknown": ({"q_data_type": "float17"}, InvalidTypeError, "float17"),
    "kv-dtype": ({"kv_data_type": "bfloat16"}, UnsupportedOptionError, "kv_data_type"),
    "positions": ({"pos_encoding_mode": "ROPE"}, InvalidArgumentError, "NONE, ROPE_LLAMA, ALIBI, got 'ROPE'"),
    "mask-size": ({"custom_mask": torch.ones(3, dtype=torch.bool)}, InvalidArgumentError, r"custom_mask .*\[140\]"),
    "mask-dtype": ({"custom_mask": torch.ones(140)}, InvalidTypeError, "custom_mask must be torch.bool"),
    "packed-mask-size": (
        {"packed_custom_mask": torch.ones(17, dtype=torch.uint8)},
        InvalidArgumentError,
        "packed_custom_mask must have at least 18 bytes, got 17",
    ),
    "soft-cap-negative": ({"logits_soft_cap": -1.0}, InvalidArgumentError, "logits_soft_cap"),
    "rope-theta-0": ({"rope_theta": 0.0}, InvalidArgumentError, "rope_theta must be finite and greater than 0"),
}


@pytest.mark.parametrize(("changes", "error", "text"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_plan(changes: Dict[str, Any], error: Type[Exception], text: str, device: str) -> None:
    with pytest.raises(error, match=re.compile(text, re.DOTALL)):
        prefill_plan(device, **changes)


OPTIONS: Dict[str, Any] = {
    "window_left": 128,
    "logits_soft_cap": 30.0,
    "pos_encoding_mode": "ROPE_LLAMA",
    "custom_mask": torch.ones(3 * 40 + 20, dtype=torch.bool),
    "packed_custom_mask": torch.ones(18, dtype=torch.uint8),
    "head_dim_vo": 128,
    "kv_data_type": torch.float8_e5m2,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_without_a_kernel_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.SUPPORT, "cpu", variants.SUPPORT["cpu"]._replace(options=frozenset()))
    with pytest.raises(UnsupportedOptionError, match=r"is not supported\nsupported: .* on CPUs"):
        prefill_plan(**{name: OPTIONS[name]})


def test_custom_variants() -> None:
    wrappers: List[Any] = [
        flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
    ]
    for wrapper in wrappers:
        with pytest.raises(UnsupportedOptionError, match=r"^jit_args="):
            wrapper(workspace(), jit_args=["uri"])


def test_neutral_values_are_accepted() -> None:
    prefill_plan(
        window_left=-1, logits_soft_cap=0.0, rope_scale=1.0, rope_theta=1e4, pos_encoding_mode="NONE", head_dim_vo=64
    )
    prefill_plan(rope_scale=2.0, rope_theta=5e5, use_fp16_qk_reduction=True)


def add(name: str, value: Any) -> Change:
    def change(call: Dict[str, Any]) -> None:
        call[name] = value

    return change


def spoil(name: str, value: Callable[[Any], Any]) -> Change:
    def change(call: Dict[str, Any]) -> None:
        call[name] = value(call[name])

    return change


BAD_RUNS: Dict[str, Tuple[Change, Type[Exception], str]] = {
    "q-tokens": (
        spoil("q", lambda q: q[:3]),
        InvalidArgumentError,
        r"q must have shape \[4, 4, 64\], got \(3, 4, 64\)",
    ),
    "q-heads": (spoil("q", lambda q: q[:, :2]), InvalidArgumentError, "q must have shape"),
    "q-head-dim": (spoil("q", lambda q: q[..., :32]), InvalidArgumentError, "q must have shape"),
    "q-rank": (spoil("q", lambda q: q[0]), InvalidArgumentError, "q must have 3 dimensions"),
    "q-dtype": (spoil("q", torch.Tensor.bfloat16), InvalidTypeError, "q must be torch.float16, got torch.bfloat16"),
    "q-device": (spoil("q", lambda q: q.to("meta")), InvalidArgumentError, "q must be on (cpu|cuda:0), got meta"),
    "q-last-stride": (
        spoil("q", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2)),
        InvalidArgumentError,
        "last dimension of q must be contiguous",
    ),
    "cache-page-size": (spoil("cache", lambda c: c[:, :, :8]), InvalidArgumentError, "pages of 16 tokens, got 8"),
    "cache-heads": (spoil("cache", lambda c: c[:, :, :, :1]), InvalidArgumentError, "2 heads of 64 .*got 1 heads"),
    "cache-head-dim": (spoil("cache", lambda c: c[..., :32]), InvalidArgumentError, "got 2 heads of 32"),
    "cache-rank": (spoil("cache", lambda c: c[0, 0]), InvalidArgumentError, "paged_kv_cache must have shape"),
    "cache-one-side": (spoil("cache", lambda c: c[:, :1]), InvalidArgumentError, "paged_kv_cache must have shape"),
    "cache-dtype": (spoil("cache", torch.Tensor.float), InvalidTypeError, "k and v must be torch.float16"),
    "cache-device": (
        spoil("cache", lambda c: c.to("meta")),
        InvalidArgumentError,
        "k and v must be on (cpu|cuda:0), got meta",
    ),
    "cache-list": (spoil("cache", lambda c: [c]), InvalidTypeError, "paged_kv_cache must be"),
    "cache-shapes": (spoil("cache", lambda c: (c[:, 0], c[1:, 1])), InvalidArgumentError, "v_cache must have shape"),
    "out-shape": (spoil("out", lambda o: o[:3]), InvalidArgumentError, "out must have shape"),
    "out-dtype": (
        spoil("out", torch.Tensor.float),
        InvalidTypeError,
        r"out must be torch.float16(.|\n)*so allocate it so: torch\.empty\(4, 4, 64, dtype=torch\.float16, device=",
    ),
    "out-expanded": (spoil("out", lambda o: o[:1].expand(4, 4, 64)), InvalidArgumentError, "elements of out share"),
    "out-overlapping": (
        spoil("out", lambda o: o.flatten().as_strided((4, 4, 64), (128, 32, 1))),
        InvalidArgumentError,
        "elements of out share memory",
    ),
    "out-last-stride": (
        spoil("out", lambda o: o.transpose(1, 2).contiguous().transpose(1, 2)),
        InvalidArgumentError,
        "last dimension of out must be contiguous(.|\n)*torch.empty",
    ),
    "lse-expanded": (spoil("lse", lambda lse: lse[:1].expand(4, 4)), InvalidArgumentError, "lse must be contiguous"),
    "lse-shape": (spoil("lse", lambda lse: lse[:, :2]), InvalidArgumentError, "lse must have shape"),
    "lse-dtype": (spoil("lse", torch.Tensor.double), InvalidTypeError, "lse must be torch.float32"),
    "lse-strides": (
        spoil("lse", lambda lse: lse.new_empty(4, 8)[:, :4]),
        InvalidArgumentError,
        "lse must be contiguous",
    ),
    "k-scale": (add("k_scale", "0.5"), InvalidTypeError, "k_scale must be a number, a tensor or None, got str"),
    "k-scale-shape": (add("k_scale", torch.ones(3)), InvalidArgumentError, r"k_scale must have.*\[2\].*\(3,\)"),
    "k-scale-negative": (add("k_scale", -1.0), InvalidArgumentError, r"sm_scale \* q_scale \* k_scale"),
    "v-scale": (add("v_scale", float("nan")), InvalidArgumentError, "v_scale must be finite, got nan"),
    "v-scale-dtype": (add("v_scale", torch.ones(2).double()), InvalidTypeError, "v_scale must be torch.float32"),
    "v-scale-device": (add("v_scale", torch.ones(2, device="meta")), InvalidArgumentError, "v_scale must be on"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_run(change: Change, error: Type[Exception], text: str, device: str) -> None:
    b = batch(device)
    call: Dict[str, Any] = {"q": b.q, "cache": b.cache, "out": torch.empty_like(b.q)}
    call["lse"] = torch.empty(4, 4, device=device)
    change(call)
    with pytest.raises(error, match=text):
        prefill_plan(device).run(call.pop("q"), call.pop("cache"), **call)


def test_run_before_plan() -> None:
    with pytest.raises(InvalidArgumentError, match="no plan"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace()).run(batch().q, batch().cache)


def test_run_with_arguments_of_a_custom_variant() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"\*args"):
        prefill_plan().run(batch().q, batch().cache, 1.0)


def test_ragged_rows_that_the_plan_needs() -> None:
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    wrapper.plan(ints(0, 3), ints(0, 9), 4, 2, 64)
    k = torch.zeros(8, 2, 64, dtype=torch.float16)
    with pytest.raises(InvalidArgumentError, match="at least 9 rows, got 8"):
        wrapper.run(torch.zeros(3, 4, 64, dtype=torch.float16), k, k)


@pytest.mark.parametrize("layout", ["nhd", "NDH", None])
def test_layout(layout: Any) -> None:
    for expected in (InvalidArgumentError, KeyError):  # FlashInfer raises the latter
        with pytest.raises(expected, match=r"^kv_layout must be 'NHD' or 'HND', got"):
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), layout)


def test_backend() -> None:
    with pytest.raises(InvalidArgumentError, match="backend must be one of auto, fa2, fa3"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend="fa4")


def native_plan(**changes: Any) -> Any:
    b = batch()
    arguments: Dict[str, Any] = {
        "q_indptr": b.q_indptr,
        "kv_indptr": b.indptr,
        "kv_len": b.kv_len,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "page_size": 16,
        "dtype": torch.float16,
        "device": "cpu",
    }
    return plan_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        pytest.param({"kv_len": None}, InvalidArgumentError, "kv_len is needed", id="paged-without-lengths"),
        pytest.param({"kv_len": ints(49, 20)}, InvalidArgumentError, "request 0 has 49 keys.*48", id="too-many-keys"),
        pytest.param({"kv_len": ints(-1, 20)}, InvalidArgumentError, r"kv_len\[0\]", id="negative-length"),
        pytest.param({"kv_indptr": ints(0, 9, 5)}, InvalidArgumentError, "kv_indptr must not decrease", id="decreases"),
        pytest.param({"device": "meta"}, UnsupportedDeviceError, "no kernels for meta", id="device"),
        pytest.param({"dtype": "float16"}, InvalidTypeError, "must be a torch.dtype", id="dtype-name"),
    ],
)
def test_native_plan(changes: Dict[str, Any], error: Type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        native_plan(**changes)


def test_native_run() -> None:
    b = batch()
    with pytest.raises(InvalidArgumentError, match="page_table is missing"):
        attention(b.q, b.k, b.v, plan=native_plan())
    with pytest.raises(InvalidArgumentError, match="at least 5 entries, got 4"):
        attention(b.q, b.k, b.v, plan=native_plan(), page_table=b.indices[:4])
    with pytest.raises(InvalidTypeError, match=r"page_table must be torch\.int32"):
        attention(b.q, b.k, b.v, plan=native_plan(), page_table=b.indices.long())
    ragged = native_plan(page_size=None, kv_len=None)
    with pytest.raises(InvalidArgumentError, match="ragged"):
        attention(b.q, b.k.flatten(0, 1), b.v.flatten(0, 1), plan=ragged, page_table=b.indices)


def test_single_prefill_with_fewer_keys_than_queries() -> None:
    k = torch.zeros(5, 2, 64)
    with pytest.raises(InvalidArgumentError, match="as many keys as queries, got 4 and 5"):
        flashinfer.single_prefill_with_kv_cache(k, k[:4], k[:4], causal=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_logits(scale: float, device: str) -> None:
    k = torch.zeros(5, 2, 64, dtype=torch.float16, device=device)
    b = batch(device)
    calls: List[Callable[..., Any]] = [
        functools.partial(single, k, k, k),
        functools.partial(flashinfer.single_decode_with_kv_cache, k[0], k, k),
        functools.partial(flashinfer.single_prefill_with_kv_cache, k, k, k),
        functools.partial(prefill_plan(device).forward, b.q, b.cache),
        functools.partial(attention, b.q, b.k, b.v, plan=native_plan(device=device), page_table=b.indices.to(device)),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="sm_scale must be finite and greater than 0"):
            call(sm_scale=scale)


def test_single() -> None:
    k = torch.zeros(5, 2, 64)
    with pytest.raises(InvalidArgumentError, match="q must have 3 dimensions"):
        single(k[0], k, k)
    with pytest.raises(InvalidArgumentError, match="3 and 2"):
        single(torch.zeros(1, 3, 64), k, k)
    with pytest.raises(InvalidArgumentError, match="v must have shape"):
        single(k, k, k[:4])
    with pytest.raises(InvalidTypeError, match=r"k and v must be torch\.float32"):
        single(k, k.half(), k.half())


@pytest.mark.parametrize("page", [HUGE, -1, 8])
def test_page_tables_are_checked_on_a_gpu_when_asked(page: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        monkeypatch.setenv("FLASHINFER_CHECK", "1")
    b = batch(device)
    b.indices[4] = page
    assert b.cache.shape[0] == 8
    with pytest.raises(InvalidArgumentError, match=f"page {page} as page 1 of request 1.*8 pages"):
        prefill_plan(device, paged_kv_indices=b.indices).run(b.q, b.cache)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "option"),
    [(264, torch.float16, "head_dim"), (512, torch.float16, "head_dim"), (64, torch.float32, "dtype")],
)
def test_gpu_limits(dim: int, dtype: torch.dtype, option: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"^{option}="):
        make_problem(4, 2, dim, False, dtype, torch.device("cuda"))


def test_gpus_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    make_problem(4, 2, 64, False, torch.float16, torch.device("cuda", 0))
    with pytest.raises(UnsupportedOptionError, match=r"dtype=torch.bfloat16(.|\n)*float16 on GPUs older than sm_80"):
        make_problem(4, 2, 64, False, torch.bfloat16, torch.device("cuda", 0))


@pytest.mark.parametrize("target", ["sm_75", "compute_75"])
def test_targets_without_bfloat16(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    make_problem(4, 2, 64, False, torch.bfloat16, torch.device("cuda", 0))
    monkeypatch.setenv("FLASHINFER_CUDA_TARGET", target)
    with pytest.raises(UnsupportedOptionError, match=r"dtype=torch.bfloat16"):
        make_problem(4, 2, 64, False, torch.bfloat16, torch.device("cuda", 0))


def test_a_cuda_device_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedDeviceError, match="no CUDA device"):
        native_plan(device="cuda")
