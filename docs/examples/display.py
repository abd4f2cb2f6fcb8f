"""Show several answers growing at once: live panels on a terminal, plain lines elsewhere."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from paged_llama import Request

WORDS_PER_LINE = 12  # of the plain display


class Panels:
    """One panel for each request, two in a row, above a bar of all tokens."""

    def __init__(self, console: Console, tokenizer: Any, titles: Sequence[str], total: int) -> None:
        self.tokenizer, self.titles = tokenizer, titles
        self.texts = [""] * len(titles)
        self.bar = progress_bar(console)
        self.task = self.bar.add_task("answering as one batch", total=total)
        self.live = Live(self._render(), console=console, refresh_per_second=8, vertical_overflow="visible")

    def update(self, requests: Sequence[Request]) -> None:
        """Show what `requests` hold now."""
        self.texts = [self.tokenizer.decode(request.answer, skip_special_tokens=True) for request in requests]
        self.bar.update(self.task, completed=sum(len(request.answer) for request in requests))
        self.live.update(self._render())

    def finish(self, requests: Sequence[Request]) -> None:
        """Show the answers whole and fill the bar, which requests that ended early leave short."""
        self.update(requests)
        self.bar.update(self.task, total=self.bar.tasks[0].completed)
        self.live.update(self._render())

    def _render(self) -> Group:
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        panels = [Panel(Text(text), title=Text(title)) for text, title in zip(self.texts, self.titles)]
        for left in range(0, len(panels), 2):
            grid.add_row(*panels[left : left + 2])
        return Group(grid, self.bar)


class Lines:
    """A line for every dozen words that a request has got, and for its last words."""

    def __init__(self, console: Console, tokenizer: Any, titles: Sequence[str]) -> None:
        self.console, self.tokenizer = console, tokenizer
        self.shown = [0] * len(titles)
        for number, title in enumerate(titles):
            self._print(number, title)

    def update(self, requests: Sequence[Request]) -> None:
        """Print the full lines that are new since the last call."""
        self._advance(requests, WORDS_PER_LINE)

    def finish(self, requests: Sequence[Request]) -> None:
        """Print the last words."""
        self._advance(requests, 0)

    def _advance(self, requests: Sequence[Request], keep: int) -> None:
        for number, request in enumerate(requests):
            words = self.tokenizer.decode(request.answer, skip_special_tokens=True).split()
            while len(words) - self.shown[number] > keep:
                line = words[self.shown[number] :][:WORDS_PER_LINE]
                self._print(number, "  " + " ".join(line))
                self.shown[number] += len(line)

    def _print(self, number: int, text: str) -> None:
        self.console.print(f"[{number + 1}] {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def streaming(console: Console, tokenizer: Any, titles: Sequence[str], total: int, plain: bool) -> Iterator[Any]:
    """Yield a display with `update` and `finish`: panels when `console` is a terminal and not `plain`, else lines."""
    if plain or not console.is_terminal:
        yield Lines(console, tokenizer, titles)
        return
    panels = Panels(console, tokenizer, titles, total)
    with panels.live:
        yield panels


def progress_bar(console: Console, disable: bool = False) -> Progress:
    """Return a bar that counts; it prints nothing when `disable` or when `console` is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=disable or not console.is_terminal)
