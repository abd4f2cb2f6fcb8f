"""Run `python -m flashinfer`, which is the command `flashinfer`."""

import sys

from flashinfer_core.cli import main

sys.exit(main())
