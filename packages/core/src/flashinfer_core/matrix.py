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
from typing import Any, Dict, Optional, Tuple

from flashinfer_core.errors import InstallationError

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One CUDA (`"12.4"`, or `"cpu"`) with the torch and Python versions that have wheels, and the NVRTC they use."""

    cuda: str
    torch: Tuple[str, ...]
    python: Tuple[str, ...] = ()
    nvrtc: str = ""

    def index(self, torch: str) -> str:
        """Return the wheel index folder of this CUDA with a torch version: `cu124/torch2.5`."""
        cuda = self.cuda if self.cuda == "cpu" else "cu" + self.cuda.replace(".", "")
        return f"{cuda}/torch{torch}"


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: version ("2.5.1"), and the CUDA it was built for ("12.4"; None: CPU only)."""

    version: str
    cuda: Optional[str]

    @property
    def minor(self) -> str:
        """Return major.minor, which is what the matrix lists."""
        return ".".join(self.version.split(".")[:2])


@functools.lru_cache(maxsize=None)
def rows() -> Tuple[Row, ...]:
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


def parse(data: Dict[str, Any]) -> Tuple[Row, ...]:
    """Turn `{"row": [{"cuda": ..., "torch": [...], ...}]}` into rows."""
    return tuple(
        Row(str(row["cuda"]), tuple(row["torch"]), tuple(row.get("python", ())), row.get("nvrtc", ""))
        for row in data["row"]
    )


def _toml(path: Path) -> Dict[str, Any]:
    for name in ("tomllib", "tomli"):
        if importlib.util.find_spec(name):
            data: Dict[str, Any] = importlib.import_module(name).loads(path.read_text())
            return data
    raise InstallationError(
        f"reading {path} needs Python 3.11 or the package tomli", remedy="pip install tomli, or install the wheel"
    )


def torch_build() -> Optional[TorchBuild]:
    """Return the installed torch without importing it; None where there is none."""
    loaded = sys.modules.get("torch")
    if loaded is not None and hasattr(loaded, "version"):
        return TorchBuild(str(loaded.__version__).split("+")[0], loaded.version.cuda)
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    return _parse_torch_version(os.path.join(os.path.dirname(spec.origin), "version.py"))


def _parse_torch_version(path: str) -> Optional[TorchBuild]:
    try:
        with open(path) as file:
            text = file.read()
    except OSError:
        return None
    version = re.search(r"^__version__ *= *['\"]([^'\"+]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?: *: *[^=]+)? *= *['\"]([^'\"]+)", text, re.MULTILINE)
    return TorchBuild(version[1], cuda[1] if cuda else None) if version else None
