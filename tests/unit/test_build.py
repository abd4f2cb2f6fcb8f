"""A build writes every image once and compiles nothing twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashinfer_core import build
from flashinfer_core.device import candidates
from flashinfer_core.errors import CompileError
from flashinfer_core.images import Image
from tiny_package import CPU, Scale, edit, write

HERE = candidates("cpu")[0]


def _shipped(target: str) -> list[Scale]:
    assert target == HERE
    return [Scale(factor, CPU.source) for factor in (2, 3)]


def _build(folder: Path, out: str, jobs: int = 1) -> tuple[list[build.Built], list[str]]:
    lines: list[str] = []
    kernels = folder / "tiny" / "kernels"
    built = build.build_images(
        kernels, _shipped, [HERE], folder / out, folder / "cache", jobs=jobs, report=lines.append
    )
    return built, lines


@pytest.mark.parametrize("jobs", [1, 2])
def test_unchanged_images_are_reused_in_place_and_from_the_cache(tmp_path: Path, jobs: int) -> None:
    package = write(tmp_path)
    built, lines = _build(tmp_path, "out", jobs)
    assert [(one.image.name, one.reused) for one in built] == [("scale-2", False), ("scale-3", False)]
    assert len(lines) == 2
    assert lines[1].startswith(f"[2/2] {HERE} scale-")
    for one in built:
        assert one.path == tmp_path / "out" / HERE / f"{one.image.name}.image"
        assert Image.from_bytes(one.path.read_bytes()) == one.image
        assert one.path.stat().st_mode & 0o777 == 0o644
    for out in ("out", "elsewhere"):
        again, lines = _build(tmp_path, out)
        assert [(one.image, one.reused) for one in again] == [(one.image, True) for one in built]
        assert all(one.path.exists() for one in again)
        assert lines == []
    edit(package)
    assert [one.reused for one in _build(tmp_path, "out")[0]] == [False, False]


def test_a_variant_that_does_not_compile_stops_the_build(tmp_path: Path) -> None:
    package = write(tmp_path)
    (package / "kernels" / "tiny" / "scale.cpp").write_text("#error broken\n")
    with pytest.raises(CompileError, match="broken"):
        _build(tmp_path, "out", jobs=2)
    assert not (tmp_path / "out").exists()


VARIANTS = """from tiny_package import CPU, Scale
def shipped(target):
    return [Scale(factor, CPU.source) for factor in (2, 3)]
"""


def _command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashinfer_core.compiler", *arguments, "--target", HERE, "--jobs", "1"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "FLASHINFER_BUILD_CACHE": str(tmp_path / "cache")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_command_line_narrows_by_name(tmp_path: Path) -> None:
    package = write(tmp_path)
    (package / "variants.py").write_text(VARIANTS)
    (tmp_path / "pyproject.toml").touch()  # a source tree
    done = _command(tmp_path, "tiny", "--name", "*-3")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (package / "images" / HERE).iterdir()] == ["scale-3.image"]
    assert "scale-3" in done.stdout
    assert done.stderr.startswith("[1/1]")


def test_an_installed_package_is_not_written_to(tmp_path: Path) -> None:
    package = write(tmp_path)
    (package / "variants.py").write_text(VARIANTS)
    before = sorted(package.rglob("*.image"))
    done = _command(tmp_path, "tiny")
    assert done.returncode == 1
    assert "tiny is an installed package, no source tree" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("give a folder for the images: --out /tmp/images; ")
    assert sorted(package.rglob("*.image")) == before
    done = _command(tmp_path, "tiny", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "out" / HERE).iterdir())] == ["scale-2.image", "scale-3.image"]


@pytest.mark.parametrize(
    ("package", "what", "remedy"),
    [
        ("nopkg", "the package 'nopkg' is not installed", "packages of kernels: flashinfer_attention, "),
        ("no.pkg", "the package 'no.pkg' is not installed", "packages of kernels: flashinfer_attention, "),
        ("flashinfer-page", "'flashinfer-page' is not installed", "pip install -i INDEX flashinfer-page, where "),
        ("json", "has no variants.py, so 'json' is no package of kernels", "name one of: flashinfer_attention, "),
    ],
)
def test_what_is_no_package_of_kernels(tmp_path: Path, package: str, what: str, remedy: str) -> None:
    done = _command(tmp_path, package)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert what in first
    assert last.startswith(remedy)
