"""Bad input: a typed error that names it, and nothing launched."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Tuple, Type

import pytest
import torch

import flashinfer
from batches import HUGE, Paged
from flashinfer_attention import Workspace, attention, plan_attention, single, workspace_bytes
from flashinfer_attention.checks import make_problem
from flashinfer_core.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedDeviceError,
    UnsupportedOptionError,
    WorkspaceError,
)
from flashinfer_core.kernel import Kernel

Change = Callable[[Dict[str, Any]], None]


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(Kernel, "launch", launch)


def batch() -> Paged:
    return Paged([3, 1], [40, 20])


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def workspace(size: int = 1 << 20) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def prefill_plan(**changes: Any) -> flashinfer.BatchPrefillWithPagedKVCacheWrapper:
    b = batch()
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
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    wrapper.plan(**{**arguments, **changes})
    return wrapper


BAD_PLANS = {
    "heads-that-do-not-divide": ({"num_qo_heads": 5}, InvalidArgumentError, "num_qo_heads.*5 and 2"),
    "no-kv-heads": ({"num_kv_heads": 0}, InvalidArgumentError, "num_kv_heads"),
    "q-indptr-decreases": ({"qo_indptr": ints(0, 4, 3)}, InvalidArgumentError, "q_indptr must not decrease"),
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
    "head-dim-60": ({"head_dim_qk": 60}, UnsupportedOptionError, "head_dim=60.*nearest is 56"),
    "head-dim-264": ({"head_dim_qk": 264}, UnsupportedOptionError, "head_dim=264.*nearest is 256"),
    "head-dim-0": ({"head_dim_qk": 0}, UnsupportedOptionError, "head_dim=0"),
    "dtype-int8": ({"q_data_type": torch.int8}, UnsupportedOptionError, "dtype=torch.int8"),
    "dtype-unknown": ({"q_data_type": "float17"}, InvalidTypeError, "float17"),
    "kv-dtype": ({"kv_data_type": "bfloat16"}, UnsupportedOptionError, "kv_data_type"),
}


@pytest.mark.parametrize(("changes", "error", "text"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_plan(changes: Dict[str, Any], error: Type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.compile(text, re.DOTALL)):
        prefill_plan(**changes)


OPTIONS = {
    "window_left": 128,
    "logits_soft_cap": 30.0,
    "pos_encoding_mode": "ROPE_LLAMA",
    "rope_scale": 2.0,
    "rope_theta": 5e5,
    "custom_mask": torch.ones(60, dtype=torch.bool),
    "packed_custom_mask": torch.ones(8, dtype=torch.uint8),
    "use_fp16_qk_reduction": True,
    "head_dim_vo": 128,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_not_there_yet(name: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"^{name}=") as caught:
        prefill_plan(**{name: OPTIONS[name]})
    assert caught.value.option == name


@pytest.mark.parametrize("name", ["window_left", "logits_soft_cap", "pos_encoding_mode", "q_scale", "k_scale"])
def test_options_of_single_decode(name: str) -> None:
    k = torch.zeros(5, 2, 64)
    with pytest.raises(UnsupportedOptionError, match=f"^{name}="):
        flashinfer.single_decode_with_kv_cache(k[0], k, k, **{name: OPTIONS.get(name, 0.5)})


@pytest.mark.parametrize("name", ["custom_mask_buf", "mask_indptr_buf", "jit_args"])
def test_options_of_wrappers(name: str) -> None:
    value = ["uri"] if name == "jit_args" else workspace(8)
    for wrapper in (flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithRaggedKVCacheWrapper):
        with pytest.raises(UnsupportedOptionError, match=f"^{name}="):
            wrapper(workspace(), **{name: value})


def test_neutral_values_are_accepted() -> None:
    prefill_plan(
        window_left=-1, logits_soft_cap=0.0, rope_scale=1.0, rope_theta=1e4, pos_encoding_mode="NONE", head_dim_vo=64
    )


def nan_scale(call: Dict[str, Any]) -> None:
    call["k_scale"] = 0.5


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
    "q-device": (spoil("q", lambda q: q.to("meta")), InvalidArgumentError, "q must be on cpu, got meta"),
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
    "cache-device": (spoil("cache", lambda c: c.to("meta")), InvalidArgumentError, "k and v must be on cpu"),
    "cache-list": (spoil("cache", lambda c: [c]), InvalidTypeError, "paged_kv_cache must be"),
    "cache-strides": (
        spoil("cache", lambda c: (c[:, 0], c[:, 1].contiguous())),
        InvalidArgumentError,
        "k_cache and v_cache must have the same strides",
    ),
    "cache-shapes": (spoil("cache", lambda c: (c[:, 0], c[1:, 1])), InvalidArgumentError, "v_cache must have shape"),
    "out-shape": (spoil("out", lambda o: o[:3]), InvalidArgumentError, "out must have shape"),
    "out-dtype": (spoil("out", torch.Tensor.float), InvalidTypeError, "out must be torch.float16"),
    "lse-shape": (spoil("lse", lambda lse: lse[:, :2]), InvalidArgumentError, "lse must have shape"),
    "lse-dtype": (spoil("lse", torch.Tensor.double), InvalidTypeError, "lse must be torch.float32"),
    "lse-strides": (
        spoil("lse", lambda lse: lse.new_empty(4, 8)[:, :4]),
        InvalidArgumentError,
        "lse must be contiguous",
    ),
    "k-scale": (nan_scale, UnsupportedOptionError, "k_scale=0.5"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_run(change: Change, error: Type[Exception], text: str) -> None:
    b = batch()
    call: Dict[str, Any] = {"q": b.q, "cache": b.cache, "out": torch.empty_like(b.q), "lse": torch.empty(4, 4)}
    change(call)
    with pytest.raises(error, match=text):
        prefill_plan().run(call.pop("q"), call.pop("cache"), **call)


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
    with pytest.raises(InvalidArgumentError, match="kv_layout"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), layout)


def test_backend() -> None:
    with pytest.raises(InvalidArgumentError, match="backend must be one of auto, fa2, fa3"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend="fa4")


@pytest.mark.parametrize("bad", ["missing", "int64", "meta", "sizes"])
def test_graph_buffers(bad: str) -> None:
    buffers = [ints(0, 0, 0), ints(0, 0), ints(0, 0)]
    if bad == "missing":
        with pytest.raises(InvalidArgumentError, match="needs paged_kv_indptr_buffer"):
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True)
        return
    buffers[0] = {"int64": buffers[0].long(), "meta": buffers[0].to("meta"), "sizes": ints(0, 0)}[bad]
    error = InvalidTypeError if bad == "int64" else InvalidArgumentError
    with pytest.raises(error, match="paged_kv_indptr_buffer"):
        flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)


def test_graph_batches_that_do_not_fit() -> None:
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), ints(0, 0, 0), ints(0, 0), ints(0, 0))
    with pytest.raises(InvalidArgumentError, match="batches of 2 requests, got 1"):
        wrapper.plan(ints(0, 1), ints(0), ints(5), 4, 2, 64, 16)
    with pytest.raises(WorkspaceError, match=r"3 pages.*room for 2"):
        wrapper.plan(ints(0, 1, 3), ints(0, 1, 2), ints(5, 5), 4, 2, 64, 16)


def test_workspaces() -> None:
    with pytest.raises(InvalidTypeError, match="float_workspace_buffer"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper([])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="float_workspace_buffer must be a contiguous vector"):
        Workspace(workspace(64).view(8, 8))
    with pytest.raises(InvalidArgumentError, match="int_workspace_buffer must be on cpu"):
        Workspace(workspace(), workspace().to("meta"))
    with pytest.raises(InvalidArgumentError, match="num_qo_heads"):
        workspace_bytes(num_qo_heads=5, num_kv_heads=2, head_dim=64, device="cpu")


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


def test_single() -> None:
    k = torch.zeros(5, 2, 64)
    with pytest.raises(InvalidArgumentError, match="q must be a tensor of shape"):
        single(k[0], k, k)
    with pytest.raises(InvalidArgumentError, match="3 and 2"):
        single(torch.zeros(1, 3, 64), k, k)
    with pytest.raises(InvalidArgumentError, match="v must have shape"):
        single(k, k, k[:4])
    with pytest.raises(InvalidTypeError, match=r"k and v must be torch\.float32"):
        single(k, k.half(), k.half())


@pytest.mark.parametrize("page", [HUGE, -1, 8])
def test_page_tables_are_checked_when_asked(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK", "1")
    b = batch()
    b.indices[4] = page
    assert b.cache.shape[0] == 8
    with pytest.raises(InvalidArgumentError, match=f"page {page} as page 1 of request 1.*8 pages"):
        prefill_plan(paged_kv_indices=b.indices).run(b.q, b.cache)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "option"),
    [(80, torch.float16, "head_dim"), (512, torch.float16, "head_dim"), (64, torch.float32, "dtype")],
)
def test_gpu_limits(dim: int, dtype: torch.dtype, option: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"^{option}="):
        make_problem(4, 2, dim, False, dtype, torch.device("cuda"))


def test_gpus_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    make_problem(4, 2, 64, False, torch.float16, torch.device("cuda", 0))
    with pytest.raises(UnsupportedOptionError, match=r"dtype=torch.bfloat16(.|\n)*float16 on GPUs older than sm_80"):
        make_problem(4, 2, 64, False, torch.bfloat16, torch.device("cuda", 0))


def append(**changes: Any) -> None:
    cache = torch.zeros(4, 2, 16, 2, 64)
    arguments: Dict[str, Any] = {
        "append_key": torch.zeros(3, 2, 64),
        "append_value": torch.zeros(3, 2, 64),
        "batch_indices": ints(0, 0, 1),
        "positions": ints(0, 1, 0),
        "paged_kv_cache": cache,
        "kv_indices": ints(2, 0),
        "kv_indptr": ints(0, 1, 2),
        "kv_last_page_len": ints(2, 1),
    }
    flashinfer.append_paged_kv_cache(**{**arguments, **changes})


BAD_APPENDS = {
    "key-heads": ({"append_key": torch.zeros(3, 1, 64)}, InvalidArgumentError, "append_key must have shape"),
    "value-tokens": ({"append_value": torch.zeros(2, 2, 64)}, InvalidArgumentError, "append_value must have shape"),
    "dtype": (dict.fromkeys(("append_key", "append_value"), torch.zeros(3, 2, 64).half()), InvalidTypeError, "float32"),
    "positions-int64": ({"positions": torch.zeros(3).long()}, InvalidTypeError, "positions must be torch.int32"),
    "batch-indices-short": ({"batch_indices": ints(0)}, InvalidArgumentError, "batch_indices must have shape"),
    "last-page-len": ({"kv_last_page_len": ints(2)}, InvalidArgumentError, "kv_last_page_len must have shape"),
    "layout": ({"kv_layout": "HDN"}, InvalidArgumentError, "kv_layout"),
}


@pytest.mark.parametrize(("changes", "error", "text"), BAD_APPENDS.values(), ids=BAD_APPENDS)
def test_append(changes: Dict[str, Any], error: Type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        append(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({"kv_indices": ints(2, HUGE)}, f"page {HUGE} for position 0 of request 1", id="page"),
        pytest.param({"batch_indices": ints(0, 0, 2)}, "names request 2 of 2", id="request"),
        pytest.param({"positions": ints(0, 16, 0)}, "request 0 has no page for its position 16", id="position"),
    ],
)
def test_append_checks_targets_when_asked(changes: Dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK", "1")
    with pytest.raises(InvalidArgumentError, match=text):
        append(**changes)


def test_tables() -> None:
    with pytest.raises(InvalidTypeError, match=r"kv_indptr must be torch\.int32"):
        flashinfer.get_seq_lens(torch.tensor([0, 1]), ints(1), 16)
    with pytest.raises(InvalidArgumentError, match="seq_lens must have shape"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1, 2), 1)
    with pytest.raises(InvalidArgumentError, match="nnz"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1), -1)
