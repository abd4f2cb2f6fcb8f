"""Multi-LoRA operators for LLM serving, on GPUs and CPUs."""

from flashinfer_core.version import __version__ as __version__
from flashinfer_lora.lora import add_lora as add_lora
