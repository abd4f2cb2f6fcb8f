"""The reference: the model's own eager attention, one prompt at a time, and where two greedy answers part."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache

from paged_llama import Request, Timing


@torch.inference_mode()
def generate_eager(model: Any, request: Request, max_new_tokens: int, stop: int, timing: Timing) -> None:
    """Answer `request` greedily with `model` (attn_implementation="eager") and add to `timing`."""
    # The argument's name since transformers 5.24, and before.
    known = inspect.signature(model.model.forward).parameters
    cache = {"cache" if "cache" in known else "past_key_values": DynamicCache()}
    tokens = request.prompt
    while len(request.answer) < max_new_tokens and request.answer[-1:] != [stop]:
        begin = perf_counter()
        ids = torch.tensor([tokens], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=True, **cache).last_hidden_state
        row = model.lm_head(hidden[0, -1]).float()
        request.logits.append(row)
        request.answer.append(int(row.argmax()))
        seconds = perf_counter() - begin
        if tokens is request.prompt:
            timing.prefill_tokens += len(tokens)
            timing.prefill_seconds += seconds
        else:
            timing.decode_tokens += 1
            timing.decode_seconds += seconds
        tokens = request.answer[-1:]


@dataclass(frozen=True)
class Comparison:
    """How one answer relates to the reference's; logits are compared as long as both saw the same tokens."""

    agreed: int  # leading tokens that are equal
    logit_error: float  # largest |ours - reference| over the logits before each of them; inf where one is not finite
    tokens: tuple[int, int] | None = None  # (ours, reference) at the first difference, None when all are equal
    our_logits: tuple[float, float] = (0.0, 0.0)  # of these two tokens
    reference_logits: tuple[float, float] = (0.0, 0.0)
    same_length: bool = True  # where all tokens are equal as far as both answers go

    @property
    def margin(self) -> float:
        """How far both would have to move to agree; a tie, for which rounding decides, has a margin near 0."""
        return max(abs(a - b) for a, b in (self.our_logits, self.reference_logits))

    def passes(self, tie: float) -> bool:
        """Say whether the answers are equal, or part where rounding decides; never where a logit is not finite."""
        return self.same_length and self.margin <= tie and self.logit_error < math.inf

    def verdict(self, tie: float) -> str:
        """Describe the result in a few words."""
        if not self.logit_error < math.inf:
            return f"NOT FINITE up to token {self.agreed}"
        if not self.same_length:
            return f"ONE ENDS at token {self.agreed}"
        if self.tokens is None:
            return "equal"
        return f"{'a tie' if self.passes(tie) else 'DIFFERENT'} at token {self.agreed}"


def compare(ours: Request, reference: Request) -> Comparison:
    """Find the first difference between two greedy answers to one prompt."""
    error, agreed = 0.0, 0
    steps = zip(ours.answer, reference.answer, ours.logits, reference.logits)
    for our_token, token, our_row, row in steps:
        step = float((our_row - row).abs().max())
        error = max(error, step if math.isfinite(step) else math.inf)  # max() alone may drop a NaN
        if our_token != token:
            pair = [our_token, token]
            our_pair, reference_pair = our_row[pair].tolist(), row[pair].tolist()
            return Comparison(agreed, error, (our_token, token), tuple(our_pair), tuple(reference_pair))
        agreed += 1
    return Comparison(agreed, error, same_length=agreed == len(ours.answer) == len(reference.answer))
