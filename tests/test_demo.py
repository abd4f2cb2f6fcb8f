"""The demo's engine answers like the model's own eager attention, on a small random Llama."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's packages are not installed")
EXAMPLES = Path(__file__).resolve().parent.parent / "docs/examples"
sys.path.insert(0, str(EXAMPLES))

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from eager import compare, generate_eager  # noqa: E402
from paged_llama import PagedLlama, Request, Timing  # noqa: E402

NO_STOP = -1
LENGTHS = (2, 40, 16, 130, 3)
LIMIT = 8


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting for a second thread would take most of the time
    config = LlamaConfig(
        vocab_size=101, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    yield LlamaForCausalLM(config).eval()
    torch.set_num_threads(threads)


def requests(*lengths: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    return [Request(torch.randint(0, 101, (length,), generator=generator).tolist()) for length in lengths]


def answer(engine: PagedLlama, batch: list[Request], limit: int, stop: int = NO_STOP) -> list[Request]:
    for _ in engine.generate(batch, limit, stop):
        pass
    return batch


@pytest.fixture(scope="module")
def references(model: Any) -> list[Request]:
    answered = requests(*LENGTHS)
    for request in answered:
        generate_eager(model, request, LIMIT, NO_STOP, Timing())
    return answered


@pytest.mark.parametrize("page_size", [1, 5, 16], ids="page{}".format)
def test_greedy_tokens_equal_eager_ones(model: Any, references: list[Request], page_size: int) -> None:
    engine = PagedLlama(model, sum(-(-(length + LIMIT) // page_size) for length in LENGTHS), page_size)
    with torch.inference_mode():
        engine.cache.fill_(float("nan"))
    for ours, reference in zip(answer(engine, requests(*LENGTHS), LIMIT), references):
        found = compare(ours, reference)
        assert found.verdict(0.0) == "equal", found
        assert len(ours.answer) == LIMIT
        assert found.logit_error < 1e-4


def test_a_stopped_request_leaves_and_its_pages_are_free_again(model: Any) -> None:
    engine = PagedLlama(model, num_pages=16, page_size=4)
    stop = answer(engine, requests(7, 9), 8)[0].answer[3]
    stopped = answer(engine, requests(7, 9), 8, stop)[0]
    assert stopped.answer[-1] == stop
    assert len(stopped.answer) <= 4
    assert sorted(engine.allocator.free) == list(range(16))


def test_a_full_cache_says_so(model: Any) -> None:
    with pytest.raises(MemoryError, match="more pages"):
        answer(PagedLlama(model, num_pages=2, page_size=4), requests(9), 1)


def answered(tokens: list[int], *rows: list[float]) -> Request:
    return Request([0], answer=tokens, logits=[torch.tensor(row) for row in rows])


def test_compare_names_the_first_difference() -> None:
    row = [0.0, 3.0, 2.5]
    found = compare(answered([1, 1], row, row), answered([1, 2], row, row))
    assert (found.agreed, found.tokens, found.margin) == (1, (1, 2), 0.5)
    assert (found.passes(0.5), found.passes(0.4)) == (True, False)
    assert (found.verdict(0.5), found.verdict(0.4)) == ("a tie at token 1", "DIFFERENT at token 1")


NAN = float("nan")


@pytest.mark.parametrize("nan_row", [[NAN, 3.0, 2.5], [0.0, NAN, 2.5], [NAN, NAN, NAN]], ids=["other", "winner", "all"])
@pytest.mark.parametrize("tokens", [[1, 1], [1, 2]], ids=["equal", "different"])
def test_a_logit_that_is_not_finite_never_passes(nan_row: list[float], tokens: list[int]) -> None:
    row = [0.0, 3.0, 2.5]
    for ours, reference in ((nan_row, row), (row, nan_row), (nan_row, nan_row)):
        found = compare(answered([1, 1], row, ours), answered(tokens, row, reference))
        assert not found.passes(1e9)
        assert found.verdict(1e9).startswith("NOT FINITE")


def test_a_prefix_is_not_equal() -> None:
    row = [0.0, 3.0, 2.5]
    for ours, reference in (([1], [1, 1]), ([1, 1], [1]), ([], [1])):
        found = compare(answered(ours, *[row] * len(ours)), answered(reference, *[row] * len(reference)))
        assert not found.passes(1e9)
        assert found.verdict(1e9) == f"ONE ENDS at token {min(len(ours), len(reference))}"
    assert compare(answered([1], row), answered([1], row)).verdict(0.0) == "equal"
