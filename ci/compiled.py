"""The files of a wheel that are compiled: core's host extension, and the kernel images of the other packages.

Both are cached by content below FLASHINFER_BUILD_CACHE, so stamping the same files for another torch compiles nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Dict, List

from ci import machine, matrix

ROOT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """Return the folder that compiled files are kept in between builds."""
    return Path(os.environ.get("FLASHINFER_BUILD_CACHE") or ROOT / "build" / "cache").resolve()


def platform_tag() -> str:
    """Spell this machine's platform as wheels do: `linux_x86_64`."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def host_tag() -> str:
    """Return the tag of the wheel that holds the host extension, for the running Python: `cp311-cp311-linux_x86_64`."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return f"{python}-{python}-{platform_tag()}"


def images_tag() -> str:
    """Return the tag of a wheel of kernel images, which runs on every Python."""
    return f"py3-none-{platform_tag()}"


def host(package: Path) -> Dict[Path, str]:
    """Compile the host extension and write the matrix; map both files to their names in the import package.

    Raises FileNotFoundError where Python's own headers are missing.
    """
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise FileNotFoundError(
            f"{header} is missing; install Python's headers: apt install python3-dev, or a full Python"
        )
    build_host = load("build_host", package / "build_host.py")
    extension = build_host.build(cache() / "host" / "out", build_dir=cache() / "host")
    listed = cache() / "matrix.json"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(json.dumps(matrix.load(), indent=1, sort_keys=True))
    return {extension: extension.name, listed: listed.name}


def images(source: Path) -> Dict[Path, str]:
    """Compile every image that the package in `source` ships for the wanted targets; map each to its name in it."""
    from flashinfer_core.build import build_images

    variants = load(f"{source.name}_variants", source / "variants.py")
    out = cache() / "images" / source.name
    shutil.rmtree(out, ignore_errors=True)  # holds what an earlier build with other targets left
    built = build_images(
        source / "kernels",
        variants.shipped,
        targets(),
        out,
        cache() / "compiled",
        nvrtc=os.environ.get("FLASHINFER_CUDA") or None,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return {one.path: f"images/{one.path.relative_to(out)}" for one in built}


def targets() -> List[str]:
    """List the targets that FLASHINFER_TARGETS asks for (default: this machine's CPU levels, and its GPU)."""
    from flashinfer_core import targets as known

    asked = os.environ.get("FLASHINFER_TARGETS")
    names = asked.split(",") if asked else ["cpu", *machine.gpu_targets()]
    return known.expand(names, machine.MACHINE)


def load(name: str, path: Path) -> ModuleType:
    """Import one file by its path, without the package around it (whose __init__ may want torch)."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
