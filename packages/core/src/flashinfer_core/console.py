"""Printing a report to a reader who may leave before its end: `flashinfer doctor | head`."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Print `text`; a closed pipe is no error, and what comes later is dropped."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more at its end, into a place that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
