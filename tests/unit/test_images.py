"""An image is found in the package, in the cache, or compiled, and each step says why the one before failed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from flashinfer_core import cache, compiler, images
from flashinfer_core.device import candidates
from flashinfer_core.errors import CorruptImageError, MissingImageError
from flashinfer_core.images import Image
from tiny_package import CPU, GPU, edit, needs_nvrtc, write

HERE = candidates("cpu")[0]
SAMPLE = Image(
    "scale-3", "scale<3>", "sm_80", "_Z5scale", "k", "s", "NVRTC 13.0", ("-std=c++17",), 8, 0, 0, 0.5, b"\n\0x"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the tiny package with an empty cache, in memory and on disk."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_MEMORY", {})
    return write(tmp_path)


def _ship(package: Path, variant: object, target: str) -> Path:
    image = compiler.compile_image(variant, target)
    path = images.path_of(package / "images", target, image.name)
    path.parent.mkdir(parents=True)
    path.write_bytes(image.to_bytes())
    return path


def test_bytes_round_trip() -> None:
    assert Image.from_bytes(SAMPLE.to_bytes()) == SAMPLE


@pytest.mark.parametrize("cut", range(0, len(SAMPLE.to_bytes()), 29))
def test_short_file_is_noticed(cut: int) -> None:
    with pytest.raises(CorruptImageError):
        Image.from_bytes(SAMPLE.to_bytes()[:cut])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\n",
        b"[1, 2]\n",
        b"{}\npayload",
        SAMPLE.to_bytes()[:-1] + b"y",
        SAMPLE.to_bytes() + b"\0",
        SAMPLE.to_bytes().replace(b'"flashinfer_image": 1', b'"flashinfer_image": 2'),
        SAMPLE.to_bytes().replace(b'"entry"', b'"gate"'),
    ],
    ids=["empty", "not utf-8", "not an object", "no fields", "flipped", "longer", "format", "field"],
)
def test_rubbish_is_noticed(data: bytes) -> None:
    with pytest.raises(CorruptImageError):
        Image.from_bytes(data)


def test_shipped_image_is_used_while_its_sources_are_unchanged(package: Path) -> None:
    path = _ship(package, CPU, HERE)
    assert images.find(CPU, HERE) == Image.from_bytes(path.read_bytes())
    edit(package)
    with pytest.raises(MissingImageError, match=r"scale-3\.image: compiled from other sources than"):
        images.find(CPU, HERE)


def test_damaged_shipped_image_is_told_and_left(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _ship(package, CPU, HERE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MissingImageError, match=r"scale-3\.image: damaged"):
        images.find(CPU, HERE)
    assert "reinstall tiny" in caplog.text
    assert path.exists()


@pytest.mark.usefixtures("package")
def test_a_cpu_image_is_never_compiled_at_run_time() -> None:
    with pytest.raises(MissingImageError) as caught:
        images.find(CPU, ["x86_64_v3", "x86_64_v2"])
    assert "no image of scale-3 for x86_64_v3 or x86_64_v2" in str(caught.value)
    assert "x86_64_v2/scale-3.image: No such file" in str(caught.value)
    assert caught.value.remedy.endswith("python -m flashinfer_core.compiler tiny --target x86_64_v3")


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_compile_is_logged_once_with_reason_and_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = images.find(GPU, ["sm_80", "compute_80"])
    assert first.target == "sm_80"
    [record] = [record for record in caplog.records if record.name == "flashinfer"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("compiled scale-3 for sm_80 in ")
    assert f"kept in {tmp_path / 'cache'}) because: " in record.getMessage()
    assert "sm_80/scale-3.image: No such file or directory" in record.getMessage()
    caplog.clear()
    assert images.find(GPU, "sm_80") == first
    cache._MEMORY.clear()
    assert images.find(GPU, "sm_80") == first
    assert caplog.records == []


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_no_compile_forbids_compiling_and_allows_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_NO_COMPILE", "1")
    with pytest.raises(MissingImageError, match="FLASHINFER_NO_COMPILE forbids compiling"):
        images.find(GPU, "sm_80")
    monkeypatch.setenv("FLASHINFER_NO_COMPILE", "0")
    image = images.find(GPU, "sm_80")
    monkeypatch.setenv("FLASHINFER_NO_COMPILE", "1")
    assert images.find(GPU, "sm_80") == image


@needs_nvrtc
@pytest.mark.parametrize("target", ["sm_80", "compute_75"])
def test_any_shipped_image_that_runs_comes_before_a_compile(package: Path, target: str) -> None:
    _ship(package, GPU, target)
    assert images.find(GPU, ["sm_86", "sm_80", "compute_80", "compute_75"]).target == target
    assert not Path(str(package.parent / "cache")).exists()


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_each_target_may_have_its_own_variant() -> None:
    image = images.find_first({"sm_75": GPU, "compute_75": dataclasses.replace(GPU, factor=5)})
    assert (image.target, image.name) == ("sm_75", "scale-3")


@pytest.mark.usefixtures("package")
def test_without_nvrtc_the_error_lists_both_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_core import nvrtc
    from flashinfer_core.errors import InstallationError

    def absent() -> None:
        raise InstallationError("no NVRTC was found; looked at:\n  /nowhere")

    monkeypatch.setattr(nvrtc, "find", absent)
    with pytest.raises(MissingImageError, match=r"(?s)sm_80/scale-3.image: No such file.*no NVRTC was found"):
        images.find(GPU, "sm_80")
