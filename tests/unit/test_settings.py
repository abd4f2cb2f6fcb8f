"""Environment variables: what switches mean, which targets and thread counts are refused; all are documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashinfer_core import settings
from flashinfer_core.errors import InvalidArgumentError

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"\bFLASHINFER_[A-Z_]+\b")


@pytest.mark.parametrize("switch", settings.SWITCHES)
@pytest.mark.parametrize(
    ("value", "on"),
    [(None, False), ("", False), ("0", False), ("False", False), ("off", False), ("1", True), ("yes", True)],
)
def test_switch(switch: str, value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(switch, raising=False)
    if value is not None:
        monkeypatch.setenv(switch, value)
    assert settings.enabled(switch) is on


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_target_is_forced_unless_asked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.FORCED_TARGETS[kind], raising=False)
    assert settings.forced_target(kind) == ""
    monkeypatch.setenv(settings.FORCED_TARGETS[kind], "sm_90")
    assert settings.forced_target(kind) == "sm_90"


@pytest.mark.parametrize(
    ("kind", "name", "fitting", "text"),
    [
        ("cpu", "avx512", None, r"FLASHINFER_CPU_TARGET=avx512 is not a target of cpu kernels\nunset it.*x86_64_v2"),
        ("cpu", "sm_90", ["x86_64_v2"], r"=sm_90 is not a target of cpu kernels\nunset it, or use one of: x86_64_v2$"),
        ("cuda", "x86_64_v2", None, r"FLASHINFER_CUDA_TARGET=x86_64_v2 is not .*\nunset it.*sm_75, sm_80"),
        (
            "cuda",
            "sm_80",
            ["sm_90"],
            r"FLASHINFER_CUDA_TARGET=sm_80 cannot run on GPU 1\nunset it, or use one of: sm_90$",
        ),
    ],
)
def test_wrong_target(kind: str, name: str, fitting: list[str] | None, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        settings.check_target(kind, name, fitting, "GPU 1")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²", "4097", " "])
def test_wrong_number_of_threads(text: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"is not a number of threads\nunset it, or use a number from 1 to 4096"
    ):
        settings.parse_threads(text)


def test_number_of_threads() -> None:
    assert [settings.parse_threads(text) for text in ("1", "4096")] == [1, 4096]


def test_every_variable_that_the_packages_read_is_known_and_documented() -> None:
    sources = [path.read_text() for path in (ROOT / "packages").glob("*/src/**/*.py")]
    named = {name for text in sources for name in NAME.findall(text)}
    assert named <= set(settings.KNOWN)
    described = set(NAME.findall((ROOT / "docs" / "images.md").read_text()))
    # Those of nox, the wheel build and the tests among themselves.
    internal = {"FLASHINFER_CUDA", "FLASHINFER_INDEX", "FLASHINFER_LOCAL_VERSION"}
    assert set(settings.KNOWN) - described == internal
