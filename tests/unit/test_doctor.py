"""Doctor runs on a machine without torch, driver or GPU, prints for people and machines, and exits by its findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashinfer_core
from flashinfer_core import doctor
from flashinfer_core.matrix import torch_build

PROGRAM = ("-m", "flashinfer_core")
SCRIPT = ("-c", "import sys; from flashinfer_core.cli import main; sys.exit(main())", "doctor")


def _run(
    *arguments: str, program: tuple[str, ...] = PROGRAM, options: tuple[str, ...] = (), path: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, *program, *arguments]
    environment = {**os.environ, "PYTHONPATH": path or os.pathsep.join(sys.path), "FLASHINFER_CACHE_DIR": "/nowhere"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", [PROGRAM, SCRIPT], ids=["module", "script"])
def test_without_torch_it_reports_and_exits_with_1(program: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "flashinfer_core").symlink_to(Path(flashinfer_core.__file__).parent)
    done = _run(program=program, options=("-S",), path=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "problem: torch is not installed" in done.stdout
    assert "mend: pip install torch" in done.stdout
    assert "cache        /nowhere: No such file or directory" in done.stdout


def test_json_holds_the_same_facts() -> None:
    done = _run("--json")
    content = json.loads(done.stdout)
    assert done.returncode == bool(content["problems"])
    assert content["python"] == ".".join(map(str, sys.version_info[:3]))
    build = torch_build()
    assert content["torch"] == (build and {"version": build.version, "cuda": build.cuda})
    assert content["environment"]["FLASHINFER_CACHE_DIR"] == "/nowhere"
    assert all(set(problem) == {"kind", "what", "remedy"} for problem in content["problems"])


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_leaves_early_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == _run(*arguments).returncode


def test_the_command_needs_a_command_and_knows_its_version() -> None:
    assert _run(program=SCRIPT[:2]).returncode == 2
    assert _run("--version", program=SCRIPT[:2]).stdout.strip() == flashinfer_core.__version__


def test_gathering_never_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer_core._host", None)
    monkeypatch.delattr(flashinfer_core, "_host", raising=False)
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path))
    facts = doctor.gather()
    assert "_host" in facts.host_error
    assert facts.cache[str(tmp_path)] == ""
