"""Add wheels to an index on disk.

Wheels are put in place before the pages that link to them, each file by one rename, so a reader never meets a broken
link or half a file. What is there stays: pages list old and new wheels.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterable, List, Set

from packaging.utils import NormalizedName

from wheelindex.errors import ConflictError
from wheelindex.pages import project_page, root_page
from wheelindex.wheels import read


def add(root: Path, paths: Iterable[Path]) -> List[Path]:
    """Add wheels to the index at `root`, each to the directory of its local version; return the directories touched.

    Raises BadWheelError for a wheel that cannot be read or is not stamped, and ConflictError for one whose name the
    index has with other bytes; nothing is written then.
    """
    placed = {root / wheel.directory / wheel.project / wheel.filename: wheel for wheel in map(read, paths)}
    for target, wheel in placed.items():
        if target.exists() and read(target).sha256 != wheel.sha256:
            raise ConflictError(f"{target} exists with other bytes; a changed wheel needs a new version")
    for target, wheel in placed.items():
        _write(target, wheel.path.read_bytes())
    touched: Dict[Path, Set[Path]] = defaultdict(set)
    for target in placed:
        touched[target.parent.parent].add(target.parent)
    for directory, projects in touched.items():
        for project in sorted(projects):
            page = project_page(NormalizedName(project.name), map(read, project.glob("*.whl")))
            _write(project / "index.html", page.encode())
        names = (NormalizedName(page.parent.name) for page in directory.glob("*/index.html"))
        _write(directory / "index.html", root_page(names).encode())
    return sorted(touched)


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
