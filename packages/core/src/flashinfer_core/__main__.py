"""Run `python -m flashinfer_core`: the doctor."""

import sys

from flashinfer_core.doctor import main

sys.exit(main())
