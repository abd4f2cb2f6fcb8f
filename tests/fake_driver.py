"""A libcuda.so.1 of our own that records what it is asked: tests/unit/fake_cuda/fake_cuda.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Dict, List

from flashinfer_core import compiler

SOURCE = Path(__file__).parent / "unit" / "fake_cuda" / "fake_cuda.cpp"


class FakeDriver:
    """A folder with the driver in it, found by a process that gets `variables`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = folder / "log"
        library = str(folder / "libcuda.so.1")
        command = [*compiler.cxx().split(), "-std=c++17", "-shared", "-fPIC", *flags, str(SOURCE), "-o", library]
        subprocess.run(command, check=True)
        self.variables: Dict[str, str] = {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_LOG": str(self.log)}

    @property
    def calls(self) -> List[str]:
        """What was asked since `forget`."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def forget(self) -> None:
        if self.log.exists():
            self.log.unlink()
