"""An image is found in the package, in the cache, or compiled, and each step says why the one before failed."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from flashinfer_core import cache, compiler, images
from flashinfer_core.device import candidates
from flashinfer_core.errors import CorruptImageError, MissingImageError
from flashinfer_core.images import Image
from tiny_package import CPU, GPU, Scale, edit, find, needs_nvrtc, write

HERE = candidates("cpu")[0]
SAMPLE = Image(
    "scale-3", "scale<3>", "sm_80", "_Z5scale", "k", "s", "NVRTC 13.0", ("-std=c++17",), 8, 0, 0, 0.5, b"\n\0x"
)

MISSING = object()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the tiny package with an empty cache, in memory and on disk."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_MEMORY", {})
    return write(tmp_path)


def _ship(package: Path, variant: Scale, target: str) -> Path:
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


def test_machine_code_is_deflated_and_nothing_else_is_taken_for_it() -> None:
    repeated = dataclasses.replace(SAMPLE, payload=b"code" * 1000)
    assert len(repeated.to_bytes()) < len(SAMPLE.to_bytes()) + 100
    assert Image.from_bytes(repeated.to_bytes()) == repeated
    header = json.loads(SAMPLE.to_bytes().partition(b"\n")[0])
    del header["sha256"]
    as_it_is = images._line({**header, "sha256": images._checksum(header, b"code")}) + b"code"
    with pytest.raises(CorruptImageError, match="not deflated"):
        Image.from_bytes(as_it_is)


def _with(**changes: object) -> bytes:
    """Write SAMPLE with other header fields and the checksum that fits them."""
    line, _, payload = SAMPLE.to_bytes().partition(b"\n")
    header = {**json.loads(line), **changes}
    del header["sha256"]
    header = {name: value for name, value in header.items() if value is not MISSING}
    return images._line({**header, "sha256": images._checksum(header, payload)}) + payload


def test_what_makes_a_header_is_known() -> None:
    assert _with() == SAMPLE.to_bytes()


def test_a_flipped_bit_is_noticed_anywhere() -> None:
    for position in range(len(SAMPLE.to_bytes())):
        data = bytearray(SAMPLE.to_bytes())
        data[position] ^= 1
        with pytest.raises(CorruptImageError):
            Image.from_bytes(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\n",
        b"[1, 2]\n",
        b"[" * 200_000,
        b"{}\npayload",
        SAMPLE.to_bytes() + b"\0",
        SAMPLE.to_bytes().replace(b"_Z5scale", b"_Z5other"),
        _with(flashinfer_image=1),
        _with(entry=MISSING),
        _with(gate="_Z5scale"),
        _with(name=3),
        _with(key=None),
        _with(registers="8"),
        _with(spill_bytes=True),
        _with(seconds="0.5"),
        _with(flags="-O3"),
        _with(flags=[1]),
    ],
    ids=[
        "empty", "not utf-8", "not an object", "deep", "no fields", "longer", "header", "format", "missing field",
        "unknown field", "name", "key", "registers", "spill_bytes", "seconds", "flags", "flag",
    ],
)  # fmt: skip
def test_rubbish_is_noticed(data: bytes) -> None:
    with pytest.raises(CorruptImageError):
        Image.from_bytes(data)


def test_shipped_image_is_used_while_its_sources_are_unchanged(package: Path) -> None:
    path = _ship(package, CPU, HERE)
    assert find(CPU, HERE) == Image.from_bytes(path.read_bytes())
    edit(package)
    with pytest.raises(MissingImageError, match=r"scale-3\.image: compiled from other sources than"):
        find(CPU, HERE)


def test_damaged_shipped_image_is_told_and_left(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _ship(package, CPU, HERE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MissingImageError, match=r"scale-3\.image: damaged"):
        find(CPU, HERE)
    assert "reinstall tiny" in caplog.text
    assert path.exists()


@pytest.mark.usefixtures("package")
def test_a_cpu_image_is_never_compiled_at_run_time() -> None:
    with pytest.raises(MissingImageError) as caught:
        find(CPU, "x86_64_v3", "x86_64_v2")
    assert "no image of scale-3 for x86_64_v3 or x86_64_v2" in str(caught.value)
    assert "x86_64_v2/scale-3.image: No such file" in str(caught.value)
    assert caught.value.remedy.endswith("python -m flashinfer_core.compiler tiny --target x86_64_v3")


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_compile_is_logged_once_with_reason_and_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = find(GPU, "sm_80", "compute_80")
    assert first.target == "sm_80"
    [record] = [record for record in caplog.records if record.name == "flashinfer"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("compiled scale-3 for sm_80 in ")
    assert f"kept in {tmp_path / 'cache'}) because: " in record.getMessage()
    assert "sm_80/scale-3.image: No such file or directory" in record.getMessage()
    caplog.clear()
    assert find(GPU, "sm_80") == first
    cache._MEMORY.clear()
    assert find(GPU, "sm_80") == first
    assert caplog.records == []


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_no_compile_forbids_compiling_and_allows_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_NO_COMPILE", "1")
    with pytest.raises(MissingImageError, match="FLASHINFER_NO_COMPILE forbids compiling"):
        find(GPU, "sm_80")
    monkeypatch.setenv("FLASHINFER_NO_COMPILE", "0")
    image = find(GPU, "sm_80")
    monkeypatch.setenv("FLASHINFER_NO_COMPILE", "1")
    assert find(GPU, "sm_80") == image


@needs_nvrtc
@pytest.mark.parametrize("target", ["sm_80", "compute_75"])
def test_any_shipped_image_that_runs_comes_before_a_compile(package: Path, target: str) -> None:
    _ship(package, GPU, target)
    assert find(GPU, "sm_86", "sm_80", "compute_80", "compute_75").target == target
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
        find(GPU, "sm_80")
