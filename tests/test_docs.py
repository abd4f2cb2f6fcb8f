"""Every Python example of the documentation runs, and every link and file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, List

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "docs/*.md", "packages/*/README.md")
    for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:packages|ci|docs|tests|benchmarks|wheelindex)/[\w./-]+)`")
FOLDER = re.compile(r"`([\w.-]+/)`")


def examples(page: str) -> List[str]:
    """Return the page's Python blocks, each behind as many empty lines as it has on the page: errors name its line."""
    lines, blocks, begin = (ROOT / page).read_text(encoding="utf-8").splitlines(), [], 0
    for number, line in enumerate(lines):
        if line == "```python":
            begin = number + 1
        elif line == "```" and begin:
            blocks.append("\n" * begin + "\n".join(lines[begin:number]))
            begin = 0
    return blocks


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_examples_run(page: str) -> None:
    namespace: Dict[str, Any] = {}
    for block in examples(page):
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = [(ROOT / page).parent / target for target in LINK.findall(text)]
    named += [ROOT / path for path in PATH.findall(text)]
    named += [ROOT / folder for folder in FOLDER.findall(text)]
    assert [str(path) for path in named if not path.exists()] == []
