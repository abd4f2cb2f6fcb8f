"""Add wheels to an index: `python -m wheelindex ROOT WHEEL...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from wheelindex import tree
from wheelindex.errors import WheelIndexError


def main(arguments: Optional[List[str]] = None) -> int:
    """Print the directories that changed; return 1 where a wheel was refused."""
    parser = argparse.ArgumentParser(prog="wheelindex", description=__doc__)
    parser.add_argument("root", type=Path, metavar="ROOT", help="the index; made where it does not exist")
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    options = parser.parse_args(arguments)
    try:
        touched = tree.add(options.root, options.wheels)
    except WheelIndexError as error:
        print(f"wheelindex: {error}", file=sys.stderr)
        return 1
    for directory in touched:
        print(f"pip install flashinfer-python -i {directory.resolve().as_uri()}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
