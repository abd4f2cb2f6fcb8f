"""Read ci/matrix.toml, the list of what is built and what it is tested with.

One `Build` is one directory of the index: a CUDA (or none) with one torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

PATH = Path(__file__).resolve().parent / "matrix.toml"


@dataclass(frozen=True)
class Build:
    """One directory of the index and what its wheels are made with.

    `cuda` is "cpu" or a version ("13.0"), `torch` a minor version ("2.11") and `release` the one that is installed to
    test it; `nvrtc` is a requirement, empty for cpu; `targets` are the GPU targets, without the CPU's.
    """

    cuda: str
    torch: str
    release: str
    pythons: Tuple[str, ...]
    nvrtc: str
    targets: Tuple[str, ...]

    @property
    def platform(self) -> str:
        return "cpu" if self.cuda == "cpu" else "cu" + self.cuda.replace(".", "")

    @property
    def directory(self) -> str:
        """Name the directory of the index: `cu130/torch2.11`."""
        return f"{self.platform}/torch{self.torch}"

    @property
    def local_version(self) -> str:
        """Spell the local version of its wheels: `cu130torch2.11`."""
        return f"{self.platform}torch{self.torch}"


def load(path: Path = PATH) -> Dict[str, Any]:
    """Return the parsed matrix."""
    name = "tomllib" if importlib.util.find_spec("tomllib") else "tomli"
    data: Dict[str, Any] = importlib.import_module(name).loads(path.read_text())
    return data


def builds(data: Dict[str, Any]) -> List[Build]:
    """List every directory of the index, in the matrix's order."""
    return list(_builds(data))


def _builds(data: Dict[str, Any]) -> Iterator[Build]:
    for row in data["row"]:
        for torch in row["torch"]:
            facts = data["torch"][torch]
            yield Build(
                row["cuda"],
                torch,
                facts["release"],
                tuple(facts["python"]),
                row.get("nvrtc", ""),
                tuple(row["targets"]),
            )


def named(data: Dict[str, Any], directory: str) -> Build:
    """Return the build of one directory (`cpu/torch2.13`); raise LookupError that lists all."""
    for build in builds(data):
        if build.directory == directory:
            return build
    known = ", ".join(build.directory for build in builds(data))
    raise LookupError(f"ci/matrix.toml has no {directory!r}; it has {known}")


def newest(data: Dict[str, Any], cuda: str, python: str) -> Build:
    """Return the build of `cuda` with the newest torch that has wheels for `python` ("3.11"); raise LookupError."""
    fitting = [build for build in builds(data) if build.cuda == cuda and python in build.pythons]
    if not fitting:
        raise LookupError(f"ci/matrix.toml lists no torch for CUDA {cuda!r} and Python {python}")
    return max(fitting, key=lambda build: tuple(map(int, build.torch.split("."))))


def cpu_targets(data: Dict[str, Any], machine: str = platform.machine()) -> Tuple[str, ...]:
    """List the CPU targets of a machine (`uname -m`); raise LookupError for one that has none."""
    try:
        return tuple(data["machine"][machine])
    except KeyError:
        raise LookupError(f"ci/matrix.toml has no CPU targets for {machine!r}") from None
