"""Bad input to the operators of the paged cache: a typed error that names it, and nothing launched."""

from __future__ import annotations

from typing import Any, Dict, Type

import pytest
import torch

import flashinfer
from batches import HUGE
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedDeviceError

pytestmark = pytest.mark.usefixtures("no_launch")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def append(device: str = "cpu", **changes: Any) -> None:
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
    for name, value in {**arguments, **changes}.items():
        arguments[name] = value.to(device) if device != "cpu" else value
    flashinfer.append_paged_kv_cache(**arguments)


BAD_APPENDS = {
    "key-heads": ({"append_key": torch.zeros(3, 1, 64)}, InvalidArgumentError, "append_key must have shape"),
    "value-tokens": ({"append_value": torch.zeros(2, 2, 64)}, InvalidArgumentError, "append_value must have shape"),
    "dtype": (dict.fromkeys(("append_key", "append_value"), torch.zeros(3, 2, 64).half()), InvalidTypeError, "float32"),
    "positions-int64": ({"positions": torch.zeros(3).long()}, InvalidTypeError, "positions must be torch.int32"),
    "batch-indices-short": ({"batch_indices": ints(0)}, InvalidArgumentError, "batch_indices must have shape"),
    "last-page-len": ({"kv_last_page_len": ints(2)}, InvalidArgumentError, "kv_last_page_len must have shape"),
    "layout": ({"kv_layout": "HDN"}, InvalidArgumentError, "kv_layout"),
    "cache-expanded": (
        {"paged_kv_cache": torch.zeros(4, 2, 1, 2, 64).expand(4, 2, 16, 2, 64)},
        InvalidArgumentError,
        r"elements of paged_kv_cache share memory: .*\nallocate it with torch\.empty",
    ),
    "cache-empty-pages": ({"paged_kv_cache": torch.zeros(4, 2, 0, 2, 64)}, InvalidArgumentError, "at least one token"),
    "values-expanded": (
        {"paged_kv_cache": [torch.zeros(1, 16, 2, 64).expand(4, 16, 2, 64)] * 2},
        InvalidArgumentError,
        "elements of k_cache share memory",
    ),
    "cache-transposed": (
        {"paged_kv_cache": torch.zeros(4, 2, 16, 64, 2).transpose(3, 4)},
        InvalidArgumentError,
        r"last dimension of paged_kv_cache .*\nallocate the cache that way",
    ),
    "values-dtype": (
        {"paged_kv_cache": (torch.zeros(4, 16, 2, 64), torch.zeros(4, 16, 2, 64).half())},
        InvalidTypeError,
        r"v_cache must be torch.float32, .*\nallocate the cache that way",
    ),
    "meta": (
        {"paged_kv_cache": torch.zeros(4, 2, 16, 2, 64, device="meta")},
        UnsupportedDeviceError,
        "paged_kv_cache is on meta, and there are no kernels for it",
    ),
}


@pytest.mark.parametrize(("changes", "error", "text"), BAD_APPENDS.values(), ids=BAD_APPENDS)
def test_append(changes: Dict[str, Any], error: Type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        append(**changes)


BAD_TARGETS = {
    "page": ({"kv_indices": ints(2, HUGE)}, f"page {HUGE} for position 0 of request 1, but the cache has 4 pages"),
    "first-page-outside": ({"kv_indices": ints(4, 0)}, "page 4 for position 0 of request 0"),
    "negative-page": ({"kv_indices": ints(2, -1)}, "page -1 for position 0 of request 1"),
    "request": ({"batch_indices": ints(0, 0, 2)}, r"batch_indices\[2\] names request 2 of 2"),
    "negative-request": ({"batch_indices": ints(0, -1, 1)}, r"batch_indices\[1\] names request -1 of 2"),
    "entry": (
        {"kv_indptr": ints(0, 1, 9), "positions": ints(0, 1, 20)},
        "request 1 at entry 2 of kv_indices, which has 2",
    ),
    "negative-entry": ({"kv_indptr": ints(-3, 1, 2)}, "request 0 at entry -3 of kv_indices"),
}


@pytest.mark.parametrize(("changes", "text"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_append_refuses_targets_outside_of_the_cache(changes: Dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        append(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize(("changes", "text"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_append_refuses_targets_on_a_gpu_when_asked(
    changes: Dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK", "1")
    with pytest.raises(InvalidArgumentError, match=text):
        append(device="cuda", **changes)


def test_a_token_without_a_page_is_an_error_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK", "1")
    with pytest.raises(InvalidArgumentError, match="request 0 has no page for its position 16"):
        append(positions=ints(0, 16, 0))


def test_lengths_beyond_int32() -> None:
    with pytest.raises(InvalidArgumentError, match="request 1 has 2147483650 tokens, more than int32 holds"):
        flashinfer.get_seq_lens(ints(0, 1, 1 + 2**21), ints(5, 1026), 1024)
    assert flashinfer.get_seq_lens(ints(0, 1, 1 + 2**21), ints(5, 1023), 1024).tolist() == [5, 2**31 - 1]


@pytest.mark.gpu
def test_lengths_beyond_int32_saturate_on_a_gpu() -> None:
    lengths = flashinfer.get_seq_lens(ints(0, 1, 1 + 2**21).cuda(), ints(5, 1026).cuda(), 1024)
    assert lengths.tolist() == [5, 2**31 - 1]


def test_tables() -> None:
    with pytest.raises(InvalidTypeError, match=r"kv_indptr must be torch\.int32"):
        flashinfer.get_seq_lens(torch.tensor([0, 1]), ints(1), 16)
    with pytest.raises(InvalidArgumentError, match="seq_lens must have shape"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1, 2), 1)
    with pytest.raises(InvalidArgumentError, match="nnz"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1), -1)
    with pytest.raises(InvalidArgumentError, match="kv_last_page_len must be on cpu, got meta"):
        flashinfer.get_seq_lens(ints(0, 1), ints(1).to("meta"), 16)
    with pytest.raises(InvalidArgumentError, match="seq_lens must be on cpu, got meta"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1).to("meta"), 1)
    with pytest.raises(InvalidTypeError, match=r"page_size must be an integer, got 16\.0"):
        flashinfer.get_seq_lens(ints(0, 1), ints(1), 16.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="nnz must be an integer"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1), None)  # type: ignore[arg-type]
