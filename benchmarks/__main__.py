"""Run benchmarks: `python -m benchmarks [NAME [ARGUMENTS]]`; without a name all of them, with their defaults."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HELPERS = {"__init__", "__main__", "plot", "report"}
NAMES = sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - HELPERS)


def main() -> int:
    """Dispatch to the named benchmark's `main`."""
    if len(sys.argv) > 1 and sys.argv[1] not in NAMES:
        print(f"{__doc__}\nnames: {', '.join(NAMES)}")
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    chosen = [(sys.argv[1], sys.argv[2:])] if len(sys.argv) > 1 else [(name, []) for name in NAMES]
    return max(int(importlib.import_module(f"benchmarks.{name}").main(arguments)) for name, arguments in chosen)


if __name__ == "__main__":
    sys.exit(main())
