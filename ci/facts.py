"""What a nox session asks of the matrix and the machine: `python -m ci.facts [BUILD]` prints it as one JSON object."""

from __future__ import annotations

import json
import os
import sys
from typing import Dict, List, Optional, Sequence, Union

from ci import compiled, machine, matrix
from ci.wheels import choose

Facts = Dict[str, Union[str, List[str]]]


def facts(build: matrix.Build, has_compiler: bool) -> Facts:
    """Return the index's address, the torch to test with, and what wheel builds and compile tests require."""
    nvrtc = build.nvrtc or matrix.load()["row"][-1]["nvrtc"]
    directory = compiled.ROOT / "build" / "index" / build.directory
    return {
        "index": f"{directory.as_uri()}/",
        "torch": f"torch=={build.release}",
        "nvrtc": nvrtc,
        "build": [*([build.nvrtc] if build.nvrtc else []), *([] if has_compiler else [machine.ZIG])],
    }


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Print the facts of the named build, of $FLASHINFER_BUILD, or of the one that fits this machine."""
    given = sys.argv[1:] if arguments is None else arguments
    name = given[0] if given else os.environ.get("FLASHINFER_BUILD")
    print(json.dumps(facts(choose(name), machine.has_compiler())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
