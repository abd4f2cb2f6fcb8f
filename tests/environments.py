"""Fresh environments to install into, as a user has them: torch is there or not, flashinfer is not."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Dict, FrozenSet, Sequence

DISTRIBUTIONS = {
    "flashinfer-core": "flashinfer_core",
    "flashinfer-attention": "flashinfer_attention",
    "flashinfer-page": "flashinfer_page",
    "flashinfer-lora": "flashinfer_lora",
    "flashinfer-python": "flashinfer",
}


class Environment:
    """A virtual environment of the running Python; `with_torch` shows it this process' packages except flashinfer's."""

    def __init__(self, folder: Path, index: str, *, with_torch: bool = True) -> None:
        self.folder = folder
        self.index = index
        venv.create(folder / "venv", symlinks=True)
        self.python_path = folder / "venv" / "bin" / "python"
        self.site = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        if with_torch:
            # Copying torch would take minutes; links to all packages but ours show pip and Python the same.
            links = folder / "packages"
            links.mkdir()
            for path in Path(sysconfig.get_path("purelib")).iterdir():
                if not path.name.startswith(("flashinfer", "__pycache__")) and path.suffix != ".pth":
                    (links / path.name).symlink_to(path)
            (self.site / "packages.pth").write_text(f"{links}\n")
        self.empty = self.files()

    def python(self, code: str, **variables: str) -> str:
        """Run code and return what it prints; raise with its output where it fails."""
        return self._run([str(self.python_path), "-c", code], variables)

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an installed script; its exit status is the caller's to judge."""
        return self._start([str(self.python_path.with_name(name)), *arguments], {})

    def pip(self, *arguments: str) -> str:
        """Run this process' pip on the environment."""
        return self._run([sys.executable, "-m", "pip", "--python", str(self.python_path), *arguments], {})

    def install(self, *names: str) -> None:
        """Install from the local index alone, as README says."""
        self.pip("install", "-q", "-i", self.index, *names)

    def uninstall(self, *names: str) -> None:
        self.pip("uninstall", "-q", "-y", *names)

    def installed(self) -> FrozenSet[str]:
        """Return the names of the flashinfer distributions that pip sees."""
        return frozenset(name for name in DISTRIBUTIONS if f"\n{name}==" in "\n" + self.pip("freeze", "--all"))

    def files(self) -> FrozenSet[str]:
        """Return all files of the environment."""
        return frozenset(str(path) for path in (self.folder / "venv").rglob("*") if not path.is_dir())

    def _run(self, command: Sequence[str], variables: Dict[str, str]) -> str:
        done = self._start(command, variables)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def _start(self, command: Sequence[str], variables: Dict[str, str]) -> subprocess.CompletedProcess[str]:
        # From a folder of its own, and without PYTHONPATH: the source tree must not be importable.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            command, cwd=self.folder, env={**environment, **variables}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
