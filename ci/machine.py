"""What the building machine has: a C++ compiler, GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from typing import List, Mapping

MACHINE = platform.machine()

# Zig's wheel holds a whole C and C++ compiler.
ZIG = "ziglang==0.17.0"


def has_compiler(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether $CXX, or one of the usual C++ compilers, is there."""
    path = environ.get("PATH")
    return bool(environ.get("CXX")) or any(shutil.which(name, path=path) for name in ("g++", "c++"))


def compiler(environ: Mapping[str, str] = os.environ) -> str:
    """Return the command line of the C++ compiler: $CXX, g++, c++, or Zig's for the running Python."""
    if environ.get("CXX"):
        return environ["CXX"]
    path = environ.get("PATH")
    found = next((name for name in ("g++", "c++") if shutil.which(name, path=path)), None)
    return found or f"{sys.executable} -m ziglang c++"


def gpu_targets() -> List[str]:
    """List the GPU targets of the GPUs that the driver's own tool reports (`sm_90`); empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return parse_capabilities(answer.stdout) if answer.returncode == 0 else []


def parse_capabilities(text: str) -> List[str]:
    """Turn lines like `9.0` into distinct targets, lowest first."""
    capabilities = {tuple(map(int, line.split("."))) for line in text.split()}
    return [f"sm_{major}{minor}" for major, minor in sorted(capabilities)]
