"""A benchmark's report says what was measured: the commit in a checkout, the version elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import flashinfer
from benchmarks import report
from ci.commit import commit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a checkout of one commit."""
    (tmp_path / "file").write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_and_whether_files_differ_from_it(checkout: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout
    assert commit(checkout) == head[:12]
    (checkout / "file").write_text("2")
    assert commit(checkout) == head[:12] + "+"


@pytest.mark.parametrize(("commit", "said"), [("abc", "commit abc"), ("", f"version {flashinfer.__version__}")])
def test_a_report_says_what_was_measured(
    commit: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "commit", lambda: commit)
    table = report.Table("Times", ["what", "us"])
    table.add(["decode", 3.14159])
    report.write_report("A device", "python -m benchmarks", [table], tmp_path / "new" / "report.md")
    text = (tmp_path / "new" / "report.md").read_text()
    assert f", flashinfer {said}, torch " in text
    assert "| decode | 3.1 |" in text


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) == ""
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit(tmp_path) == ""
