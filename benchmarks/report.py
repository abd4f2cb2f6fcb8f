"""Tables that print while they grow and are written as Markdown, with date, device, commit and command."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Sequence

import torch

import flashinfer
from ci.commit import commit


@dataclass
class Table:
    """A titled table, below `intro` if it has one; numbers get one decimal, None a dash."""

    title: str
    columns: Sequence[str]
    rows: List[List[str]] = field(default_factory=list)
    intro: str = ""

    def add(self, values: Sequence[object]) -> None:
        """Add a row and print it at once: a benchmark is long, and its reader should see it move."""
        if not self.rows:
            print(f"\n{self.title}\n{' | '.join(self.columns)}")
        self.rows.append([_cell(value) for value in values])
        print(" | ".join(self.rows[-1]), flush=True)

    def markdown(self) -> str:
        """Return the table as Markdown under a heading."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        intro = f"{self.intro}\n\n" if self.intro else ""
        return f"## {self.title}\n\n{intro}" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def write_report(device: str, command: str, tables: Sequence[Table], path: Optional[Path]) -> None:
    """Write the tables to `path`, if given, below a line that says what was measured where and when."""
    if path is None:
        return
    date = datetime.date.today().isoformat()
    here = commit()
    source = f"commit {here}" if here else f"version {flashinfer.__version__}"
    versions = f"flashinfer {source}, torch {torch.__version__}"
    head = f"# {device}\n\n{date}, {versions}. Regenerate: `{command} --write docs/benchmarks/{path.name}`\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "\n".join(table.markdown() for table in tables))
    print(f"wrote {path}")
