"""The hatchling hooks that all five packages share: version and pins, and the files that a wheel compiles.

Environment: FLASHINFER_LOCAL_VERSION (`cu130torch2.11`) stamps version and pins; FLASHINFER_TARGETS, FLASHINFER_CUDA
and FLASHINFER_BUILD_CACHE say what ci/compiled.py compiles. Without them a wheel is made for this machine alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Dict

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

PACKAGES = Path(__file__).resolve().parent
sys.path[:0] = [str(PACKAGES.parent), str(PACKAGES / "core" / "src")]

from ci import compiled, pins  # noqa: E402  the tree is importable from here on only


class Metadata(MetadataHookInterface):
    """Set version and dependencies."""

    def update(self, metadata: Dict[str, Any]) -> None:
        source = (PACKAGES / "core" / "src" / "flashinfer_core" / "version.py").read_text()
        metadata["version"] = pins.version(source, os.environ.get("FLASHINFER_LOCAL_VERSION", ""))
        metadata["dependencies"] = pins.dependencies(metadata["name"], metadata["version"])


class Build(BuildHookInterface[Any]):
    """Compile what the package's `compiles` option names, `host` or `images`, and put it into the wheel."""

    def initialize(self, version: str, build_data: Dict[str, Any]) -> None:
        del version  # standard or editable: the files are the same
        package = Path(self.root)
        source = next((package / "src").iterdir())
        if self.config["compiles"] == "host":
            files, build_data["tag"] = compiled.host(package), compiled.host_tag()
        else:
            files, build_data["tag"] = compiled.images(source), compiled.images_tag()
        build_data["pure_python"] = False
        build_data["force_include"].update({str(path): f"{source.name}/{name}" for path, name in files.items()})
