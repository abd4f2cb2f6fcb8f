"""One function compiles for GPUs and CPUs; its images do not depend on folders, and tell their resources."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Tuple

import pytest

from flashinfer_core import compiler
from flashinfer_core.device import candidates
from flashinfer_core.errors import CompileError
from tiny_package import CPU, GPU, Scale, edit, needs_nvrtc, write

HERE = candidates("cpu")[0]

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function 'mine' for 'sm_90'
ptxas         .     0 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 1024 bytes smem
"""


@pytest.mark.parametrize(
    ("entry", "expected"), [("mine", (96, 36, 1024)), ("other", (255, 16, 0)), ("absent", (None, None, None))]
)
def test_resources_are_read_off_the_log(entry: str, expected: tuple[int | None, ...]) -> None:
    assert compiler.resources(LOG, entry) == expected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return write(tmp_path)


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_gpu_image_is_a_cubin_with_its_resources() -> None:
    image = compiler.compile_image(GPU, "sm_80")
    assert image.payload[:4] == b"\x7fELF"
    assert (image.target, image.name, image.spill_bytes, image.shared_bytes) == ("sm_80", "scale-3", 0, 128)
    assert image.registers is not None
    assert 0 < image.registers < 32
    assert image.entry.startswith("_ZN4tiny5scale")


@needs_nvrtc
@pytest.mark.usefixtures("package")
def test_ptx_image_is_text_for_its_version() -> None:
    image = compiler.compile_image(GPU, "compute_75")
    assert b".target sm_75" in image.payload
    assert image.entry.encode() in image.payload
    assert (image.registers, image.spill_bytes) == (None, None)


@pytest.mark.usefixtures("package")
def test_cpu_image_exports_one_symbol_and_needs_libc_only(tmp_path: Path) -> None:
    image = compiler.compile_image(CPU, HERE)
    path = tmp_path / "image.so"
    path.write_bytes(image.payload)
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == [image.entry] == ["flashinfer_entry"]
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", needed)) <= {"libc.so.6", "libm.so.6"}


@pytest.mark.parametrize(
    ("variant", "target"), [pytest.param(GPU, "sm_80", marks=needs_nvrtc), (CPU, HERE)], ids=["gpu", "cpu"]
)
def test_images_are_reproducible_and_keys_tell_all_they_depend_on(variant: Scale, target: str, package: Path) -> None:
    first, second = (compiler.compile_image(variant, target) for _ in range(2))
    assert (first.key, first.payload) == (second.key, second.payload)
    other = compiler.compile_image(dataclasses.replace(variant, factor=4), target)
    edit(package)
    edited = compiler.compile_image(variant, target)
    assert len({first.key, other.key, edited.key}) == 3
    assert first.sources == other.sources != edited.sources


@pytest.mark.parametrize(
    ("flags", "processor"),
    [
        (("-march=x86-64-v3",), "x86_64_v3"),
        (("-march=armv8-a",), "generic"),
        (("-march=x86-64-v4", "-mamx-tile", "-mavx512bf16"), "x86_64_v4+amx_tile+avx512bf16"),
    ],
)
def test_zig_has_its_own_names_of_processors(flags: Tuple[str, ...], processor: str) -> None:
    assert compiler.zig_flags(("-fno-math-errno", *flags)) == ["-fno-math-errno", f"-mcpu={processor}"]


def test_cpu_error_quotes_the_offending_line(package: Path) -> None:
    source = package / "kernels" / "tiny" / "scale.cpp"
    source.write_text(source.read_text().replace("p.count", "p.length"))
    with pytest.raises(CompileError) as caught:
        compiler.compile_image(CPU, HERE)
    assert "length" in caught.value.log
    assert "the offending line, tiny/scale.cpp:" in str(caught.value)
    assert "i < p.length" in caught.value.remedy


@pytest.mark.usefixtures("package")
def test_cxx_may_hold_arguments_and_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LANG=C g++")
    assert "g++" in compiler.compile_image(CPU, HERE).compiler
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match=r"'no-such-compiler' does not run.*\n.*set CXX"):
        compiler.compile_image(CPU, HERE)
