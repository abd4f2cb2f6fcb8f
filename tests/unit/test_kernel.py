"""A kernel is found, loaded and launched on this machine's CPU, once per process."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from pathlib import Path

import pytest

from flashinfer_core import build, device, images, kernel, params
from flashinfer_core.errors import DriverError, MissingImageError
from flashinfer_core.images import Image
from tiny_package import CPU, Scale, write

TARGETS = device.candidates("cpu")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the tiny package with its CPU images for the best and the worst level of this machine."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(kernel, "_LOADED", {})
    params.structure.cache_clear()
    folder = write(tmp_path)
    targets = list(dict.fromkeys([TARGETS[0], TARGETS[-1]]))
    build.build_images(folder / "kernels", lambda target: [CPU], targets, folder / "images", tmp_path / "cache", jobs=1)
    return folder


def _scale(loaded: kernel.Kernel, values: list[int], workers: int) -> list[int]:
    data = (ctypes.c_int32 * len(values))(*values)
    struct = params.structure("tiny", "tiny/scale.h", "ScaleParams")
    loaded.launch(struct(data=ctypes.addressof(data), count=len(values)), workers=workers)
    return list(data)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("workers", [1, 3, 64])
def test_launch_runs_every_worker(workers: int) -> None:
    loaded = kernel.load(CPU, "cpu")
    assert _scale(loaded, list(range(100)), workers) == [3 * value for value in range(100)]
    assert (loaded.target, loaded.registers, loaded.max_workers) == (TARGETS[0], None, device.num_threads())


@pytest.mark.usefixtures("package")
def test_loaded_once_also_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[kernel.Kernel] = []
    calls: list[object] = []
    find_first = images.find_first
    monkeypatch.setattr(images, "find_first", lambda offered: calls.append(offered) or find_first(offered))
    threads = [threading.Thread(target=lambda: found.append(kernel.load(CPU, "cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert len(calls) == 1


@pytest.mark.usefixtures("package")
def test_forced_target_is_loaded_beside_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best = kernel.load(CPU, "cpu")
    monkeypatch.setenv("FLASHINFER_CPU_TARGET", TARGETS[-1])
    forced = kernel.load(CPU, "cpu")
    assert (best.target, forced.target) == (TARGETS[0], TARGETS[-1])
    assert _scale(forced, [5], 1) == [15]


@pytest.mark.usefixtures("package")
def test_factory_makes_the_variant_of_each_target() -> None:
    def only_the_oldest(target: str) -> Scale | None:
        return CPU if target == TARGETS[-1] else None

    assert kernel.load(only_the_oldest, "cpu").target == TARGETS[-1]
    with pytest.raises(MissingImageError, match="has no variant for any of"):
        kernel.load(lambda target: None, "cpu")


@pytest.mark.usefixtures("package")
def test_a_missing_variant_names_the_remedy() -> None:
    with pytest.raises(MissingImageError, match="no image of scale-7"):
        kernel.load(Scale(7, CPU.source), "cpu")


def test_an_image_that_does_not_load_is_a_driver_error(package: Path) -> None:
    path = images.path_of(package / "images", TARGETS[0], CPU.name)
    image = Image.from_bytes(path.read_bytes())
    path.write_bytes(dataclasses.replace(image, payload=b"no shared object").to_bytes())
    with pytest.raises(DriverError, match=f"loading scale-3 for {TARGETS[0]} failed"):
        kernel.load(CPU, "cpu")
