"""Make what a GPU machine without a network needs: `python -m ci.bundle OUT [--build ...] [--targets ...]`.

OUT gets an index of wheels for the running Python, the tests and benchmarks, and ci/gpu_run.sh, which installs from the
index and runs them. It is meant to be carried whole, so it has a size limit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Optional, Sequence

from ci import compiled, matrix, wheels
from wheelindex import tree

BUILD = "cu130/torch2.11"
# A cubin for the GPU at hand, and as PTX the code paths of the older architectures, which run on it too.
TARGETS = "sm_90,compute_75,compute_80,cpu"
LIMIT = 40_000_000
CARRIED = ("benchmarks", "ci", "docs/examples", "pyproject.toml", "tests", "wheelindex")


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assemble(out: Path, built: Sequence[Path], root: Path = compiled.ROOT) -> int:
    """Write the bundle anew and return its size in bytes; raise ValueError where that is over the limit."""
    shutil.rmtree(out, ignore_errors=True)
    tree.add(out / "index", built)
    for name in CARRIED:
        source, target = root / name, out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target)
    total = size(out)
    if total > LIMIT:
        raise ValueError(f"{out} has {total / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f} MB: choose fewer targets")
    return total


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Build the wheels, assemble the bundle, print its size."""
    parser = argparse.ArgumentParser(prog="python -m ci.bundle", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--build", default=BUILD, help=f"a directory of the index (default: {BUILD})")
    parser.add_argument("--targets", default=TARGETS, help=f"comma list (default: {TARGETS})")
    options = parser.parse_args(arguments)
    build = matrix.named(matrix.load(), options.build)
    folder = compiled.ROOT / "build" / f"wheels-{build.local_version}-py{wheels.running_python()}"
    built = wheels.make(folder, wheels.environment(build, options.targets))
    print(f"{options.out}: {assemble(options.out.resolve(), built) / 1e6:.1f} MB for {build.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
