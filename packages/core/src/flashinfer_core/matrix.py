"""The support matrix as data: which CUDA goes with which torch, and what the running environment has.

One list, ci/matrix.toml. The wheel of flashinfer-core carries it as matrix.json; a source tree reads the list itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from flashinfer_core.errors import InstallationError

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One CUDA (`"12.4"`, or `"cpu"`), the torch versions it has wheels for with the Pythons of each, its NVRTC."""

    cuda: str
    torch: Mapping[str, tuple[str, ...]]
    nvrtc: str = ""
    targets: tuple[str, ...] = ()

    def folder(self, torch: str) -> str:
        """Return the folder of the wheel index for a torch version of this row: `cu124/torch2.5`."""
        return f"{short_cuda(self.cuda)}/torch{torch}"


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: version ("2.5.1"), and the CUDA it was built for ("12.4"; None: CPU only)."""

    version: str
    cuda: str | None

    @property
    def minor(self) -> str:
        """Return major.minor, which is what the matrix lists."""
        return ".".join(self.version.split(".")[:2])


@functools.lru_cache(maxsize=None)
def rows() -> tuple[Row, ...]:
    """Return the matrix; raise InstallationError where neither the wheel's nor the tree's list can be read."""
    packed = _HERE / "matrix.json"
    if packed.exists():
        return parse(json.loads(packed.read_text()))
    for parent in _HERE.parents:
        listed = parent / "ci" / "matrix.toml"
        if listed.exists():
            return parse(_toml(listed))
    raise InstallationError(
        f"the support matrix {packed} is missing", remedy="pip install --force-reinstall flashinfer-core"
    )


def parse(data: Mapping[str, Any]) -> tuple[Row, ...]:
    """Turn the list `row` (cuda, nvrtc, torch, targets) and the table `torch` (version to its Pythons) into rows."""
    pythons = {version: tuple(facts["python"]) for version, facts in data["torch"].items()}
    return tuple(
        Row(
            row["cuda"],
            {version: pythons[version] for version in row["torch"]},
            row.get("nvrtc", ""),
            tuple(row.get("targets", ())),
        )
        for row in data["row"]
    )


def short_cuda(cuda: str | None) -> str:
    """Spell a CUDA version as index folders do: "12.4" is cu124, None or "cpu" is cpu."""
    return "cpu" if cuda in (None, "cpu") else "cu" + "".join(str(cuda).split(".")[:2])


def _toml(path: Path) -> dict[str, Any]:
    for name in ("tomllib", "tomli"):
        if importlib.util.find_spec(name):
            data: dict[str, Any] = importlib.import_module(name).loads(path.read_text())
            return data
    raise InstallationError(
        f"reading {path} needs Python 3.11 or the package tomli", remedy="pip install tomli, or install the wheel"
    )


def torch_build() -> TorchBuild | None:
    """Return the installed torch without importing it; None where there is none."""
    loaded = sys.modules.get("torch")
    if loaded is not None and hasattr(loaded, "version"):
        return TorchBuild(str(loaded.__version__).split("+")[0], loaded.version.cuda)
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    return _parse_torch_version(os.path.join(os.path.dirname(spec.origin), "version.py"))


def _parse_torch_version(path: str) -> TorchBuild | None:
    try:
        with open(path) as file:
            text = file.read()
    except OSError:
        return None
    version = re.search(r"^__version__ *= *['\"]([^'\"+]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?: *: *[^=]+)? *= *['\"]([^'\"]+)", text, re.MULTILINE)
    return TorchBuild(version[1], cuda[1] if cuda else None) if version else None
