"""Build the wheels of one directory of the index: `python -m ci.wheels OUT [--build cpu/torch2.13] [--targets cpu]`.

All five packages, for the running Python. When nothing that goes into them has changed since OUT was written, nothing
is done; else the compiled files come from a cache and only what changed is compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence

from ci import compiled, machine, matrix

ROOT = compiled.ROOT
PACKAGES = ("core", "attention", "page", "lora", "meta")
STAMP = "inputs.sha256"
# Bytes that one package may take when installed, with all targets of its build.
LIMIT = 40_000_000


def running_python() -> str:
    """Return the running Python as the matrix spells it: "3.11"."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def choose(name: Optional[str]) -> matrix.Build:
    """Return the build called `name`; else this Python's newest, of the newest CUDA where there is a GPU, or cpu."""
    data = matrix.load()
    if name:
        return matrix.named(data, name)
    cuda = data["row"][-1]["cuda"] if machine.gpu_targets() else "cpu"
    return matrix.newest(data, cuda, running_python())


def environment(build: matrix.Build, targets: Optional[str]) -> Dict[str, str]:
    """Return the variables that tell packages/hatch_build.py what to make."""
    variables = {"FLASHINFER_LOCAL_VERSION": build.local_version, "CXX": machine.compiler()}
    if targets:
        variables["FLASHINFER_TARGETS"] = targets
    if build.cuda != "cpu":
        variables["FLASHINFER_CUDA"] = build.cuda
    return variables


def inputs() -> List[Path]:
    """List the files that a wheel depends on."""
    found = [path for folder in ("packages", "ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = {"__pycache__", "build", "images"}
    return sorted(path for path in found if not made.intersection(path.parts) and path.suffix != ".so")


def digest(files: Iterable[Path], *extra: str) -> str:
    """Hash files, by their path in the tree and their bytes, and strings."""
    state = hashlib.sha256("\0".join(extra).encode())
    for path in files:
        content = path.read_bytes()
        state.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def check_size(wheel: Path) -> None:
    """Raise ValueError where a wheel takes more than LIMIT when installed."""
    with zipfile.ZipFile(wheel) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > LIMIT:
        raise ValueError(f"{wheel.name} unpacks to {total / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f} MB")


def make(out: Path, variables: Dict[str, str]) -> List[Path]:
    """Build all wheels into `out`, unless they are there and nothing changed; return them. Checks their sizes."""
    wanted = digest(inputs(), sys.version, *(f"{name}={value}" for name, value in sorted(variables.items())))
    stamp = out / STAMP
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for package in PACKAGES:
            command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
            subprocess.run(command, cwd=ROOT / "packages" / package, env={**os.environ, **variables}, check=True)
        for wheel in out.glob("*.whl"):
            check_size(wheel)
        stamp.write_text(wanted)
    return sorted(out.glob("*.whl"))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Print each wheel and its size; return the status of the first build that failed."""
    parser = argparse.ArgumentParser(prog="python -m ci.wheels", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--build",
        default=os.environ.get("FLASHINFER_BUILD"),
        help="a directory of the index; default: $FLASHINFER_BUILD, or the newest one that fits this machine",
    )
    parser.add_argument(
        "--targets",
        default=os.environ.get("FLASHINFER_TARGETS"),
        help="comma list; default: $FLASHINFER_TARGETS, or this machine's CPU levels and its GPU",
    )
    options = parser.parse_args(arguments)
    try:
        wheels = make(options.out.resolve(), environment(choose(options.build), options.targets))
    except subprocess.CalledProcessError as error:
        return error.returncode
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
