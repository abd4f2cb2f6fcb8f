"""Tables that print while they grow and are written as Markdown, with the date, the device and the command."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Sequence

import torch

import flashinfer


@dataclass
class Table:
    """A titled table; numbers get one decimal, None a dash."""

    title: str
    columns: Sequence[str]
    rows: List[List[str]] = field(default_factory=list)

    def add(self, values: Sequence[object]) -> None:
        """Add a row and print it at once: a benchmark is long, and its reader should see it move."""
        if not self.rows:
            print(f"\n{self.title}\n{' | '.join(self.columns)}")
        self.rows.append([_cell(value) for value in values])
        print(" | ".join(self.rows[-1]), flush=True)

    def markdown(self) -> str:
        """Return the table as Markdown under a heading."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def write_report(device: str, command: str, tables: Sequence[Table], path: Optional[Path]) -> None:
    """Write the tables to `path`, if given, below a line that says what was measured where and when."""
    if path is None:
        return
    date = datetime.date.today().isoformat()
    versions = f"flashinfer {flashinfer.__version__}, torch {torch.__version__}"
    head = f"# {device}\n\n{date}, {versions}. Regenerate: `{command} --write {path}`\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "\n".join(table.markdown() for table in tables))
    print(f"wrote {path}")
