"""The include closure of a kernel source: all bytes that its image depends on.

Includes are written relative to a `kernels` folder; the package's own comes first, flashinfer_core's second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Mapping, Sequence

from flashinfer_core.errors import CompileError, InstallationError

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)

CORE = Path(__file__).resolve().parent
KERNEL_PACKAGES = ("flashinfer_attention", "flashinfer_page", "flashinfer_lora")


def package_folder(package: str) -> Path:
    """Return the folder of an import package without importing it; raise InstallationError where there is none."""
    if package == "flashinfer_core":
        return CORE
    # find_spec imports what is before a dot, so only one name is looked for.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for location in (spec.submodule_search_locations or ()) if spec else ():
        return Path(location)
    raise InstallationError(f"the package {package!r} is not installed", remedy=_how_to_install(package))


def _how_to_install(package: str) -> str:
    """Return pip's command for a package of ours, and the names of ours where it is none: pip knows others by it."""
    name = package.replace("-", "_")
    if name in KERNEL_PACKAGES:
        asked = f", and name it {name}" if name != package else ""
        return f"pip install -i INDEX {name.replace('_', '-')}, where the other flashinfer wheels came from{asked}"
    return f"packages of kernels: {', '.join(KERNEL_PACKAGES)}; one of your own must be importable (PYTHONPATH)"


def roots(kernels: Path) -> tuple[Path, ...]:
    """Return the include path of a package's `kernels` folder."""
    return tuple(dict.fromkeys((kernels, CORE / "kernels")))


def closure(sources: Sequence[str], include_roots: Sequence[Path]) -> dict[str, bytes]:
    """Map every file that `sources` include, directly or not, themselves included, to its bytes, in order of name.

    Conditional includes count as taken, so the closure is the same for every target.
    Raises CompileError for an include that no root has.
    """
    files: dict[str, bytes] = {}
    waiting: list[tuple[str, str]] = [(name, "") for name in sources]
    while waiting:
        name, includer = waiting.pop()
        if name in files:
            continue
        files[name] = _read(name, includer, include_roots)
        waiting += [(match.decode(), name) for match in _INCLUDE.findall(files[name])]
    return dict(sorted(files.items()))


def _read(name: str, includer: str, include_roots: Sequence[Path]) -> bytes:
    for root in include_roots:
        try:
            return (root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
    asked = f", included by {includer}" if includer else ""
    raise CompileError(
        f"no file {name!r}{asked}",
        remedy=f"includes are relative to one of: {', '.join(map(str, include_roots))}",
    )


def digest(files: Mapping[str, bytes]) -> str:
    """Hash names and bytes of a closure."""
    state = hashlib.sha256()
    for name, content in files.items():
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()
