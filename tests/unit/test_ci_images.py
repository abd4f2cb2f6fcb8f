"""Reading cubins, counting CTAs of an SM, and the page that says so of every image."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Tuple

import pytest

from ci import cubin, images
from ci.occupancy import CHIPS, ctas_of_sm
from flashinfer_core import compiler, device, kernel
from flashinfer_core.images import find_first
from tiny_package import GPU, needs_nvrtc, write

# target, (threads, registers, shared bytes): CTAs by hand, and what limits them
CASES = [
    ("sm_80", (128, 64, 0), 8),  # registers: 8 warps of 2048 in each quarter
    ("sm_80", (128, 32, 0), 16),  # warps
    ("sm_80", (32, 16, 0), 32),  # CTAs
    ("sm_80", (128, 32, 48 << 10), 3),  # 49 KiB of 164
    ("sm_86", (256, 128, 0), 2),  # registers: 4 warps of 4096 in each quarter
    ("sm_86", (256, 32, 99 << 10), 1),  # shared memory: all of it
    ("sm_89", (32, 16, 0), 24),  # CTAs
    ("sm_75", (256, 40, 32 << 10), 2),  # shared memory
    ("sm_75", (1024, 64, 0), 1),  # registers and warps
    ("sm_75", (1024, 65, 0), 0),  # registers: 7 warps of 2304 in each quarter
    ("sm_90", (128, 255, 0), 2),  # registers: 2 warps of 8192 in each quarter
    ("sm_90a", (384, 168, 100 << 10), 1),  # registers: 3 warps of 5376 in each quarter
    ("sm_90", (128, 32, (227 << 10) + 1), 0),  # more than one CTA may have
    ("sm_90", (128, 32, 113 << 10), 2),
]


@pytest.mark.parametrize(("target", "takes", "ctas"), CASES)
def test_ctas_of_an_sm(target: str, takes: Tuple[int, int, int], ctas: int) -> None:
    threads, registers, shared = takes
    assert ctas_of_sm(CHIPS[target], threads=threads, registers=registers, shared_bytes=shared) == ctas


@pytest.mark.gpu
@pytest.mark.parametrize("package", images.PACKAGES)
def test_the_driver_counts_as_many(package: str) -> None:
    gpu, candidates = device.gpu(0), device.candidates(0)
    for variant in importlib.import_module(f"flashinfer_{package}.variants").shipped(candidates[0]):
        image = find_first(dict.fromkeys(candidates, variant))
        if image.target not in CHIPS:
            pytest.skip(f"{image.target} is translated by the driver, which chooses registers of its own")
        shared = (image.shared_bytes or 0) + variant.shared_bytes
        ctas = ctas_of_sm(
            CHIPS[image.target], threads=variant.threads, registers=image.registers or 0, shared_bytes=shared
        )
        assert kernel.load(variant, 0).max_workers == ctas * gpu.sm_count, variant.name


@needs_nvrtc
@pytest.mark.parametrize("target", CHIPS)
def test_a_cubin_says_what_its_assembler_said(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path)
    image = compiler.compile_image(GPU, target)
    read = cubin.resources(image.payload, image.entry)
    assert (read.registers, read.shared_bytes) == (image.registers, image.shared_bytes) == (image.registers, 128)
    assert read.stack_bytes == 0
    assert images.use(image, GPU) == images.Use(target, "scale-3", 32, read.registers, 0, 0, 128)
    with pytest.raises(ValueError, match="no kernel other in the cubin, which has"):
        cubin.resources(image.payload, "other")


@pytest.mark.parametrize("data", [b"", b"//\n.version 8.0", b"\x7fELF\x01"])
def test_what_is_no_cubin(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an ELF64 file"):
        cubin.resources(data, "kernel")


def test_the_page_names_what_does_not_fit() -> None:
    good = images.Use("sm_80", "small", 128, 64, 0, 0, 48 << 10)
    spilling = images.Use("sm_80", "spilling", 128, 255, 16, 8, 0)
    large = images.Use("sm_75", "large", 128, 64, 0, 0, 65 << 10)
    assert [one.fits for one in (good, spilling, large)] == [True, False, False]
    assert (good.ctas, good.occupancy) == (3, 12 / 64)
    page = images.report([good, spilling, large], "NVRTC 13.0", "2026-11-25").splitlines()
    assert "| small | 128 | 64 | 0 | 0 | 48 (29 %) | 3 | 19 % |" in page
    assert "| sm_80 | 2 | 1 | 255 | 48 of 163 KiB | 12 to 19 % |" in page
    assert "| sm_75 | 1 | 0 | 64 | 65 of 64 KiB | 0 to 0 % |" in page
    assert [line for line in page if line.startswith("## ")] == ["## sm_80", "## sm_75"]
    assert "2026-11-25, NVRTC 13.0. Regenerate: `nox -s images -- --write docs/benchmarks/images.md`" in page[2]


@needs_nvrtc
def test_the_command_measures_the_smallest_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "PACKAGES", ("page",))
    monkeypatch.setenv("FLASHINFER_BUILD_CACHE", str(tmp_path))
    assert images.main(["--target", "sm_80", "--write", str(tmp_path / "images.md")]) == 0
    page = (tmp_path / "images.md").read_text()
    assert page in capsys.readouterr().out
    assert "| append-16 | 128 |" in page
