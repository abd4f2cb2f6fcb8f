"""Bad input to the operators of the paged cache: a typed error that names it, and nothing launched."""

from __future__ import annotations

from typing import Any, Dict, Type

import pytest
import torch

import flashinfer
from batches import HUGE
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError

pytestmark = pytest.mark.usefixtures("no_launch")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
    with pytest.raises(InvalidArgumentError, match="kv_last_page_len must be on cpu, got meta"):
        flashinfer.get_seq_lens(ints(0, 1), ints(1).to("meta"), 16)
    with pytest.raises(InvalidArgumentError, match="seq_lens must be on cpu, got meta"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1).to("meta"), 1)
    with pytest.raises(InvalidTypeError, match=r"page_size must be an integer, got 16\.0"):
        flashinfer.get_seq_lens(ints(0, 1), ints(1), 16.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="nnz must be an integer"):
        flashinfer.get_batch_indices_positions(ints(0, 1), ints(1), None)  # type: ignore[arg-type]
