"""What works where: the answers without a GPU, and the page of the documentation that is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from flashinfer_attention import launch, supports, why_not
from flashinfer_attention.support import OPTIONS, table
from flashinfer_attention.variants import SUPPORT
from flashinfer_core.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    MissingImageError,
    UnsupportedOptionError,
)
from flashinfer_core.targets import TARGETS

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == table(), "write table() to docs/support.md"


@pytest.mark.parametrize("target", ["sm_90", "compute_75"])
def test_a_gpu_that_holds_a_tile_is_not_refused_for_an_older_one(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Dict[str, Any] = {}

    def load(factory: Any, where: Any) -> Any:
        del where
        asked.update({name: factory(name) for name in dict.fromkeys((target, "compute_75"))})
        if not any(asked.values()):
            raise MissingImageError("none")
        return asked

    monkeypatch.setattr(launch, "load", load)
    key = launch._Key("f16", "f16", 256, 256, 64, 0, "", general=True, rotary=True)
    if target == "compute_75":
        with pytest.raises(UnsupportedOptionError, match="RoPE on compute_75"):
            launch._attention.__wrapped__(key)
    else:
        launch._attention.__wrapped__(key)
        assert asked["sm_90"] is not None
        assert asked["compute_75"] is None


@pytest.mark.parametrize("target", TARGETS)
def test_plain_attention_runs_everywhere(target: str) -> None:
    assert supports(target)
    assert why_not(target, dtype="float16", kv_dtype=torch.float16, head_dim=64, head_dim_vo=64) == []


def test_every_reason_is_given() -> None:
    reasons = why_not("sm_75", dtype="bfloat16", kv_dtype="int8", head_dim=63)
    assert [reason.split("=")[0] for reason in reasons] == ["dtype", "kv_dtype", "head_dim"]
    assert "float16 on GPUs older than sm_80" in reasons[0]
    assert "dtype=torch.float32" in why_not("sm_90", dtype="float32")[0]
    assert why_not("x86_64_v2", dtype="float32") == []


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"target": "sm_70"}, InvalidArgumentError, "unknown target 'sm_70'"),
        ({"target": "sm_80", "dtype": "float17"}, InvalidTypeError, "dtype must be a torch.dtype or its name"),
        ({"target": "sm_80", "options": ("sink",)}, InvalidTypeError, "unknown option 'sink'"),
    ],
)
def test_questions_without_meaning(call: Dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        why_not(**call)


def test_support_names_options_that_exist() -> None:
    for support in SUPPORT.values():
        assert support.options <= set(OPTIONS)
