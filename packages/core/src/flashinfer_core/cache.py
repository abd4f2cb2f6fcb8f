"""The user's cache of compiled images: never needed, never trusted blindly, never a reason to fail.

Every folder of the search order that is this user's alone is read; the first that takes a write keeps the entry.
Entries are named by their key, written to a temporary file and renamed, and checked when read. There are no locks:
processes that want the same image compile it once each at worst, and the last rename wins with the same bytes.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flashinfer_core.errors import CorruptImageError

if TYPE_CHECKING:
    from flashinfer_core.images import Image

# Not `flashinfer`: FlashInfer itself keeps its own files in a folder of that name.
_NAME = "flashinfer-images"
_LOG = logging.getLogger("flashinfer")
_MEMORY: dict[str, Image] = {}


def folders() -> list[Path]:
    """List where entries may lie, best first; none of them needs to exist."""
    found: list[Path] = []
    if os.environ.get("FLASHINFER_CACHE_DIR"):
        found.append(Path(os.environ["FLASHINFER_CACHE_DIR"]).absolute())
    if os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")):  # its specification ignores relative paths
        found.append(Path(os.environ["XDG_CACHE_HOME"]) / _NAME)
    home = os.path.expanduser("~")  # stays "~" where neither HOME nor the user database knows
    if os.path.isabs(home):
        found.append(Path(home) / ".cache" / _NAME)
    found += [folder / f"{_NAME}-{os.geteuid()}" for folder in _shared()]
    return list(dict.fromkeys(found))


def _shared() -> list[Path]:
    """List the folder for temporary files, which others may write too; none where no folder can be written."""
    try:
        return [Path(tempfile.gettempdir())]
    except OSError:
        return []


def load(key: str) -> Image | None:
    """Return the image stored under `key`, or None. A damaged entry is removed."""
    if key in _MEMORY:
        return _MEMORY[key]
    for folder in folders():
        if rejection(folder):
            continue
        image = read(entry(folder, key), key)
        if image:
            _MEMORY[key] = image
            return image
    return None


def store(image: Image) -> str:
    """Keep `image` for this process and, where a folder can be written, for later ones; return where, for people."""
    _MEMORY[image.key] = image
    for folder in folders():
        try:
            # Owner only: what lies here is executed, so nobody else may write it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if rejection(folder):
                continue
            write(entry(folder, image.key), image)
        except OSError as error:  # read-only, no space, no permission, a file in the way
            _LOG.debug("cannot keep an image in %s: %s", folder, error)
            continue
        return str(folder)
    return "memory"


def entry(folder: Path, key: str) -> Path:
    """Return the file of `key` in a cache folder."""
    return folder / f"{key}.image"


def read(path: Path, key: str) -> Image | None:
    """Return the image in `path` if it is that of `key`, else None; remove a damaged file, leave a foreign one."""
    from flashinfer_core.images import Image

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        foreign = _foreign(os.fstat(file.fileno()))
        if foreign:
            _warn_once(str(path), foreign)
            return None
        try:
            image = Image.from_bytes(file.read())
            return image if image.key == key else None
        except OSError:
            return None
        except CorruptImageError as error:
            _LOG.warning("removing the damaged cache entry %s: %s", path, error)
    try:
        path.unlink()
    except OSError:
        _LOG.debug("cannot remove %s", path)
    return None


def write(path: Path, image: Image, *, mode: int = 0o600) -> None:
    """Write one entry so that a reader sees all of it or nothing; raise OSError and leave nothing behind."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(image.to_bytes())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def rejection(folder: Path) -> str:
    """Say why a cache folder is not used; empty where it is fit. Warns once about one that others control."""
    try:
        status = os.stat(folder)
        if folder.parent in _shared() and stat.S_ISLNK(os.lstat(folder).st_mode):
            return _warn_once(str(folder), "is a link that anybody could have made")
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    foreign = _foreign(status)
    return _warn_once(str(folder), foreign) if foreign else ""


def _foreign(status: os.stat_result) -> str:
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


@functools.lru_cache(maxsize=None)
def _warn_once(path: str, reason: str) -> str:
    _LOG.warning("not using the cache at %s: it %s", path, reason)
    return reason
