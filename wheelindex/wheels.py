"""What an index says of one wheel, read from its file name and its metadata."""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.metadata import ExceptionGroup, Metadata
from packaging.utils import NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from wheelindex.errors import BadWheelError

_LOCAL = re.compile(r"(?P<platform>cpu|cu\d{3})torch(?P<torch>\d+\.\d+)")


@dataclass(frozen=True)
class Wheel:
    """One wheel file; `requires_python` is empty where its metadata names none."""

    path: Path
    project: NormalizedName
    version: Version
    sha256: str
    requires_python: str

    @property
    def filename(self) -> str:
        return self.path.name

    @property
    def directory(self) -> PurePosixPath:
        """Name the directory of the index that its local version asks for: `cu130/torch2.11`.

        Raises BadWheelError for a wheel that is not stamped.
        """
        match = _LOCAL.fullmatch(self.version.local or "")
        if not match:
            raise BadWheelError(f"{self.filename}: its version needs a local part such as +cputorch2.13")
        return PurePosixPath(match["platform"], f"torch{match['torch']}")


def read(path: Path) -> Wheel:
    """Read a wheel; raise BadWheelError where file name and metadata are malformed or disagree."""
    try:
        project, version, _, _ = parse_wheel_filename(path.name)
        metadata = Metadata.from_email(_metadata(path), validate=True)
    except ExceptionGroup as errors:
        raise BadWheelError(f"{path.name}: {'; '.join(map(str, errors.exceptions))}") from errors
    except (ValueError, zipfile.BadZipFile) as error:
        raise BadWheelError(f"{path.name}: {error}") from error
    if (canonicalize_name(metadata.name), metadata.version) != (project, version):
        raise BadWheelError(f"{path.name}: its metadata says {metadata.name} {metadata.version}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(path, project, version, sha256, str(metadata.requires_python or ""))


def _metadata(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if len(names) != 1:
            raise BadWheelError(f"{path.name}: holds {len(names)} METADATA files, expected one")
        return archive.read(names[0])
