"""A kernel is found, loaded and launched on this machine's CPU, once per process."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Mapping

import pytest

from flashinfer_core import build, device, images, kernel, params
from flashinfer_core.errors import DriverError, MissingImageError
from flashinfer_core.images import Image
from flashinfer_core.variant import Variant
from tiny_package import CPU, Scale, write

TARGETS = device.candidates("cpu")
SEVEN = Scale(7, CPU.source)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the tiny package with its CPU images for the best and the worst level of this machine."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(kernel, "_LOADED", {})
    params.structure.cache_clear()
    folder = write(tmp_path)
    targets = list(dict.fromkeys([TARGETS[0], TARGETS[-1]]))
    build.build_images(folder / "kernels", lambda _: [CPU], targets, folder / "images", tmp_path / "cache", jobs=1)
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

    def counted(offered: Mapping[str, Variant]) -> Image:
        calls.append(offered)
        return find_first(offered)

    monkeypatch.setattr(images, "find_first", counted)
    threads = [threading.Thread(target=lambda: found.append(kernel.load(CPU, "cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert len(calls) == 1


@pytest.mark.usefixtures("package")
def test_a_slow_load_holds_up_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    find_first = images.find_first

    def slow(offered: Mapping[str, Variant]) -> Image:
        if next(iter(offered.values())).name == "scale-7":
            begun.set()
            assert go_on.wait(60)
        return find_first(offered)

    def load_seven() -> None:
        with pytest.raises(MissingImageError):
            kernel.load(SEVEN, "cpu")

    monkeypatch.setattr(images, "find_first", slow)
    waiting = threading.Thread(target=load_seven)
    waiting.start()
    assert begun.wait(60)
    assert kernel.load(CPU, "cpu").variant == CPU
    assert waiting.is_alive()
    go_on.set()
    waiting.join()


# A thread is in the middle of loading the kernel when the process forks; the child wants that kernel too.
FORK = """
import os, threading
from flashinfer_core import images, kernel
from tiny_package import CPU
find_first, begun, go_on, parent = images.find_first, threading.Event(), threading.Event(), os.getpid()
def slow(offered):
    if os.getpid() == parent:
        begun.set()
        go_on.wait()
    return find_first(offered)
images.find_first = slow
thread = threading.Thread(target=kernel.load, args=(CPU, "cpu"))
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    os._exit(0 if kernel.load(CPU, "cpu").variant == CPU else 1)
done, status = 0, 0
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    thread.join(0.1)
if not done:
    os.kill(child, 9)
go_on.set()
thread.join()
assert done and status == 0, "the child waits for a lock that nobody holds" if not done else status
"""


def test_a_child_forked_during_a_load_loads_too(package: Path) -> None:
    path = os.pathsep.join([str(package.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FORK], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
        kernel.load(lambda _: None, "cpu")


@pytest.mark.usefixtures("package")
def test_a_missing_variant_names_the_remedy() -> None:
    with pytest.raises(MissingImageError, match="no image of scale-7"):
        kernel.load(SEVEN, "cpu")


def test_an_image_that_does_not_load_is_a_driver_error(package: Path) -> None:
    path = images.path_of(package / "images", TARGETS[0], CPU.name)
    image = Image.from_bytes(path.read_bytes())
    path.write_bytes(dataclasses.replace(image, payload=b"no shared object").to_bytes())
    with pytest.raises(DriverError, match=f"loading scale-3 for {TARGETS[0]} failed"):
        kernel.load(CPU, "cpu")


@pytest.mark.usefixtures("package")
def test_bound_launches_patch_addresses_into_a_copy() -> None:
    loaded = kernel.load(CPU, "cpu")
    struct = params.structure("tiny", "tiny/scale.h", "ScaleParams")
    steps = [kernel.Step(loaded, struct(count=100), 3), kernel.Step(loaded, struct(count=10), 1)]
    bound = kernel.BoundLaunch(steps, [[(0, "data"), (1, "data")]])
    for _ in range(2):
        data = (ctypes.c_int32 * 100)(*range(100))
        bound.launch((ctypes.addressof(data),))
        assert list(data) == [9 * value for value in range(10)] + [3 * value for value in range(10, 100)]
    with pytest.raises(ValueError, match="takes 1 addresses, got 2"):
        bound.launch((0, 0))
    with pytest.raises(TypeError):
        bound.launch(("address",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers must be at least 1"):
        kernel.BoundLaunch([kernel.Step(loaded, struct(), 0)], [])
