"""Build the images of a package: every shipped variant for every target, in parallel, nothing twice.

An image is copied from the build cache when its key is there, so an unchanged kernel costs a hash.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Sequence

from flashinfer_core import cache, compiler, headers, targets
from flashinfer_core.console import say
from flashinfer_core.errors import FlashInferError, InstallationError, InvalidArgumentError
from flashinfer_core.images import Image, path_of
from flashinfer_core.nvrtc import find
from flashinfer_core.unit import Unit
from flashinfer_core.variant import Variant

Shipped = Callable[[str], Iterable[Variant]]


@dataclass(frozen=True)
class Built:
    """One image file of a build; `reused` where nothing had to be compiled."""

    image: Image
    path: Path
    reused: bool


def build_cache() -> Path:
    """Return the folder where builds keep compiled images: $FLASHINFER_BUILD_CACHE or ~/.cache/flashinfer-build."""
    return Path(os.environ.get("FLASHINFER_BUILD_CACHE") or os.path.expanduser("~/.cache/flashinfer-build"))


def build_images(
    package_kernels_dir: Path,
    shipped: Shipped,
    targets: Sequence[str],
    out_dir: Path,
    cache_dir: Path | None = None,
    *,
    nvrtc: str | None = None,
    jobs: int | None = None,
    report: Callable[[str], object] = str,
) -> list[Built]:
    """Write `out_dir`/<target>/<name>.image for every variant in `shipped(target)` of every target.

    `nvrtc` asks for one version ("13.0"); `jobs` processes compile at a time (default: one per CPU); `report` is
    called with a line per image. Raises CompileError at the first variant that does not compile.
    """
    folder = cache_dir or build_cache()
    folder.mkdir(parents=True, exist_ok=True)
    built: list[Built] = []
    waiting: list[tuple[Unit, Path]] = []
    for target in targets:
        for variant in shipped(target):
            unit, _ = compiler.prepare(variant, target, nvrtc=nvrtc, kernels=Path(package_kernels_dir))
            path = path_of(Path(out_dir), target, unit.name)
            image = cache.read(path, unit.key) or cache.read(cache.entry(folder, unit.key), unit.key)
            if image:
                built.append(_place(Built(image, path, True), folder))
            else:
                waiting.append((unit, path))
    total = len(built) + len(waiting)
    for image, path in _compiled(waiting, nvrtc, jobs or os.cpu_count() or 1):
        built.append(_place(Built(image, path, False), folder))
        report(f"[{len(built)}/{total}] {image.target} {image.name}: {image.seconds:.1f} s")
    return sorted(built, key=lambda one: (list(targets).index(one.image.target), one.image.name))


def _place(built: Built, folder: Path) -> Built:
    for path in (cache.entry(folder, built.image.key), built.path):
        if not path.exists() or path == built.path:
            path.parent.mkdir(parents=True, exist_ok=True)
            cache.write(path, built.image, mode=0o644)
    return built


def _compiled(waiting: Sequence[tuple[Unit, Path]], nvrtc: str | None, jobs: int) -> Iterable[tuple[Image, Path]]:
    if jobs == 1 or len(waiting) < 2:
        for unit, path in waiting:
            yield _compile(unit, nvrtc), path
        return
    # Processes, because NVRTC before 12.3 compiles one program at a time; spawned, because a fork copies held locks.
    with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, unit, nvrtc): path for unit, path in waiting}
        try:
            for future in as_completed(futures):
                yield future.result(), futures[future]
        finally:
            for future in futures:
                future.cancel()


def _compile(unit: Unit, nvrtc: str | None) -> Image:
    return compiler.compile_unit(unit, None if targets.target_named(unit.target).is_cpu else find(nvrtc))


def table(built: Sequence[Built]) -> str:
    """Format what was built, one line per image."""
    lines = [f"{'target':<11} {'variant':<40} {'regs':>5} {'spills':>7} {'shared':>7} {'bytes':>9} {'seconds':>8}"]
    for one in built:
        image = one.image
        numbers = ["-" if n is None else str(n) for n in (image.registers, image.spill_bytes, image.shared_bytes)]
        seconds = "reused" if one.reused else f"{image.seconds:.1f}"
        lines.append(
            f"{image.target:<11} {image.name:<40} {numbers[0]:>5} {numbers[1]:>7} {numbers[2]:>7} "
            f"{len(image.payload):>9} {seconds:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        folder = headers.package_folder(options.package)
        shipped = _shipped_of(options.package, folder)
        built = build_images(
            folder / "kernels",
            lambda target: [v for v in shipped(target) if fnmatch.fnmatch(v.name, options.name)],
            targets.expand(options.target.split(","), platform.machine()),
            options.out or _images_of_tree(folder),
            nvrtc=options.nvrtc,
            jobs=options.jobs,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except FlashInferError as error:
        print(error, file=sys.stderr)
        return 1
    say(table(built))
    return 0


def _shipped_of(package: str, folder: Path) -> Shipped:
    if not (folder / "variants.py").exists():
        raise InstallationError(
            f"{folder} has no variants.py, so {package!r} is no package of kernels",
            remedy=f"name one of: {', '.join(headers.KERNEL_PACKAGES)}, or a package with the same files as these",
        )
    shipped: Shipped = importlib.import_module(f"{package}.variants").shipped
    return shipped


def _images_of_tree(folder: Path) -> Path:
    """Return where the images of a source tree lie; raise where `folder` is installed, whose files are pip's."""
    if any((parent / "pyproject.toml").exists() for parent in folder.parents[:2]):
        return folder / "images"
    raise InvalidArgumentError(
        f"{folder} is an installed package, no source tree, and what pip installed is not written to",
        remedy="give a folder for the images: --out /tmp/images; those of a wheel come back with "
        f"pip install --force-reinstall {folder.name.replace('_', '-')}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flashinfer_core.compiler", description="compile a package")
    parser.add_argument("package", help="import name: flashinfer_attention")
    parser.add_argument("--target", default=os.environ.get("FLASHINFER_TARGETS", "cpu"), help="comma list: sm_90,cpu")
    parser.add_argument("--name", default="*", help="glob of variant names")
    parser.add_argument("--out", type=Path, help="folder of images (default, in a source tree only: the package's)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per CPU)")
    parser.add_argument("--nvrtc", help="version of NVRTC to use: 13.0 (default: the first found)")
    return parser
