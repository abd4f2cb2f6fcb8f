"""Multi-LoRA operators for LLM serving. This version holds none; the package settles the name and its place."""

from flashinfer_core.version import __version__ as __version__
