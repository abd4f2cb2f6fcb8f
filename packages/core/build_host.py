"""Compile the host extension `flashinfer_core._host`: `python build_host.py [OUT_DIR]`.

One object file per source, compiled again only when its command or a file it includes has changed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterable, Sequence

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "host"
KERNELS = ROOT / "src" / "flashinfer_core" / "kernels"
PACKAGE = ROOT / "src" / "flashinfer_core"
JOBS = 2

# A name of its own for pybind11's registry, which all extensions of a process share otherwise: torch's has the C++
# runtime of torch's build behind it.
OWN_REGISTRY = '-DPYBIND11_COMPILER_TYPE="_flashinfer"'
COMPILE_FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"),
    OWN_REGISTRY,
)
# The C++ runtime goes inside, with its symbols hidden: the extension runs wherever its C library does.
LINK_FLAGS = ("-shared", "-static-libstdc++", "-static-libgcc", "-Wl,-s", "-pthread", "-ldl")
HIDE_ARCHIVES = ("-Wl,--exclude-libs,ALL",)


def default_includes() -> list[str]:
    """Return the header folders of the running Python and its pybind11."""
    import pybind11

    return [sysconfig.get_paths()["include"], pybind11.get_include()]


def _is_fresh(target: Path, command: Sequence[str], inputs: Iterable[Path]) -> bool:
    recorded = target.with_suffix(".command")
    if not target.exists() or not recorded.exists() or recorded.read_text() != shlex.join(command):
        return False
    built = target.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns < built for path in inputs)


def _run(target: Path, command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building {target.name} failed:\n{shlex.join(command)}\n{done.stdout}")
    target.with_suffix(".command").write_text(shlex.join(command))


def _included(depfile: Path) -> list[Path]:
    if not depfile.exists():
        return []
    rule = depfile.read_text().replace("\\\n", " ").split(":", 1)[1]
    return [Path(name) for name in shlex.split(rule)]


def _compile(source: Path, folder: Path, compiler: Sequence[str], includes: Sequence[str]) -> Path:
    target = folder / (source.stem + ".o")
    depfile = folder / (source.stem + ".d")
    paths = [flag for path in (str(KERNELS), *includes) for flag in ("-isystem" if path in includes else "-I", path)]
    command = [*compiler, *COMPILE_FLAGS, *paths, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    dependencies = _included(depfile)
    if not dependencies or not _is_fresh(target, command, dependencies):
        _run(target, command)
    return target


def build(
    out_dir: Path,
    *,
    python_includes: Sequence[str] | None = None,
    suffix: str | None = None,
    build_dir: Path | None = None,
) -> Path:
    """Build `_host` into `out_dir` and return the file's path.

    `python_includes` are the header folders of Python and pybind11 (default: the running Python's), `suffix` the
    extension's file-name suffix (default: likewise), `build_dir` where objects are kept between builds (default:
    packages/core/build). The compiler is $CXX, or g++. Raises RuntimeError with the compiler's output.
    """
    includes = list(python_includes) if python_includes is not None else default_includes()
    suffix = suffix or str(sysconfig.get_config_var("EXT_SUFFIX"))
    folder = (build_dir or ROOT / "build") / ("host" + suffix.replace(".so", ""))
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    sources = sorted(SOURCES.glob("*.cpp"))
    with ThreadPoolExecutor(JOBS) as threads:
        objects = list(threads.map(lambda source: _compile(source, folder, compiler, includes), sources))

    library = folder / ("_host" + suffix)
    # Zig's linker knows no --exclude-libs; the C++ runtime that it brings is hidden as it is.
    hidden = () if any("zig" in word for word in compiler) else HIDE_ARCHIVES
    command = [*compiler, *map(str, objects), *LINK_FLAGS, *hidden, "-o", str(library)]
    if not _is_fresh(library, command, objects):
        _run(library, command)
    return _install(library, Path(out_dir))


def _install(library: Path, out_dir: Path) -> Path:
    """Copy under a new inode, so that processes that run the old file keep it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    final = out_dir / library.name
    temporary = out_dir / f"{library.name}.{os.getpid()}.tmp"
    temporary.write_bytes(library.read_bytes())
    temporary.chmod(0o755)
    temporary.replace(final)
    return final


def main(arguments: Sequence[str]) -> None:
    """Build for the running Python, into the source tree unless told otherwise."""
    parser = argparse.ArgumentParser(description="compile flashinfer_core._host for the running Python")
    parser.add_argument("out_dir", nargs="?", type=Path, default=PACKAGE)
    print(build(parser.parse_args(arguments).out_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
