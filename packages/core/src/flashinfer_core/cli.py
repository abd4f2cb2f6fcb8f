"""The command `flashinfer`, also `python -m flashinfer`. It lives here because it must speak where torch is missing."""

from __future__ import annotations

import argparse
from typing import Optional, Sequence

from flashinfer_core import __version__, doctor


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command on `arguments`, those of the process by default; return its exit status."""
    parser = argparse.ArgumentParser(prog="flashinfer", description="Look into a flashinfer installation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what is installed, for which devices, and what is wrong", add_help=False)
    _, rest = parser.parse_known_args(arguments)
    return doctor.main(rest)
