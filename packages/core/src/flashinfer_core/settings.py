"""What a user sets by environment variables, as values. Read at each call, so a test or a program may change them.

The functions take the text as an argument where a rule decides, so `flashinfer doctor` judges by the same rules.
"""

from __future__ import annotations

import os
from typing import Sequence

from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.targets import TARGETS

SWITCHES = ("FLASHINFER_CHECK", "FLASHINFER_NO_COMPILE", "FLASHINFER_VERBOSE")
FORCED_TARGETS = {"cpu": "FLASHINFER_CPU_TARGET", "cuda": "FLASHINFER_CUDA_TARGET"}
NUM_THREADS = "FLASHINFER_NUM_THREADS"
KNOWN = (
    *SWITCHES, *FORCED_TARGETS.values(), NUM_THREADS,
    "FLASHINFER_CACHE_DIR", "FLASHINFER_TARGETS", "FLASHINFER_BUILD", "FLASHINFER_BUILD_CACHE", "FLASHINFER_CUDA",
    "FLASHINFER_INDEX", "FLASHINFER_LOCAL_VERSION",
)  # fmt: skip

_OFF = ("", "0", "false", "no", "off")
_MOST_THREADS = 4096


def enabled(switch: str) -> bool:
    """Say whether a variable of SWITCHES is on: set to anything but 0, false, no, off or nothing."""
    return os.environ.get(switch, "").strip().lower() not in _OFF


def forced_target(kind: str) -> str:
    """Return the target that every kernel on a "cpu" or a "cuda" device must use; empty where none is forced."""
    return os.environ.get(FORCED_TARGETS[kind], "")


def check_target(kind: str, name: str, fitting: Sequence[str] | None = None, device: str = "this device") -> None:
    """Raise InvalidArgumentError unless `name` is a target of "cpu" or "cuda", and one of the `fitting` ones."""
    variable = FORCED_TARGETS[kind]
    known = [target.name for target in TARGETS.values() if target.is_cpu == (kind == "cpu")]
    remedy = f"unset it, or use one of: {', '.join(fitting if fitting is not None else known)}"
    if name not in known:
        raise InvalidArgumentError(f"{variable}={name} is not a target of {kind} kernels", remedy=remedy)
    if fitting is not None and name not in fitting:
        raise InvalidArgumentError(f"{variable}={name} cannot run on {device}", remedy=remedy)


def parse_threads(text: str) -> int:
    """Read FLASHINFER_NUM_THREADS; raise InvalidArgumentError unless it is a number from 1 to 4096."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= _MOST_THREADS:
        raise InvalidArgumentError(
            f"{NUM_THREADS}={text} is not a number of threads",
            remedy=f"unset it, or use a number from 1 to {_MOST_THREADS}",
        )
    return number
