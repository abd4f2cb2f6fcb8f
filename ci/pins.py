"""What each distribution depends on, given the local version that its wheels are stamped with.

Stamped wheels (`0.1.0+cu130torch2.11`) pin each other exactly and torch to its minor version, so that pip can never mix
two directories of the index. Unstamped ones, built by hand, pin the version and take any torch that is supported.
"""

from __future__ import annotations

import re
from typing import List

OLDEST_TORCH = "2.2"
KERNEL_PACKAGES = ("flashinfer-attention", "flashinfer-lora", "flashinfer-page")

_LOCAL = re.compile(r"(cpu|cu\d{3})torch(\d+\.\d+)")
_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


def version(source: str, local: str) -> str:
    """Return the version that `source`, the text of flashinfer_core/version.py, states, with `+local` where given."""
    stated = _VERSION.search(source)
    if not stated:
        raise ValueError("flashinfer_core/version.py states no __version__")
    return f"{stated[1]}+{local}" if local else stated[1]


def torch_pin(local: str) -> str:
    """Return the requirement on torch of wheels with this local version; raise ValueError for a malformed one."""
    if not local:
        return f"torch>={OLDEST_TORCH}"
    match = _LOCAL.fullmatch(local)
    if not match:
        raise ValueError(f"local version {local!r} is not of the form cputorch2.13 or cu130torch2.11")
    return f"torch=={match[2]}.*"


def dependencies(distribution: str, full_version: str) -> List[str]:
    """List the requirements of `distribution` at `full_version` (`0.1.0+cputorch2.13`).

    Core has none: it works without torch. The umbrella pins the other four.
    """
    if distribution == "flashinfer-core":
        return []
    siblings = ["flashinfer-core"]
    if distribution == "flashinfer-python":
        siblings += KERNEL_PACKAGES
    pinned = [f"{name}=={full_version}" for name in siblings]
    return [*pinned, torch_pin(full_version.partition("+")[2])]
