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


def test_command_line_narrows_by_name(tmp_path: Path) -> None:
    package = write(tmp_path)
    (package / "variants.py").write_text(
        "from tiny_package import CPU, Scale\n"
        "def shipped(target):\n    return [Scale(factor, CPU.source) for factor in (2, 3)]\n"
    )
    command = [
        sys.executable,
        "-m",
        "flashinfer_core.compiler",
        "tiny",
        "--target",
        HERE,
        "--name",
        "*-3",
        "--jobs",
        "1",
    ]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "FLASHINFER_BUILD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [path.name for path in (package / "images" / HERE).iterdir()] == ["scale-3.image"]
    assert "scale-3" in done.stdout
    assert done.stderr.startswith("[1/1]")
