"""A Llama whose keys and values live in one paged cache, with attention by flashinfer.

All but attention is the transformers model's own: embedding, norms, projections, rotary table, MLP. A batch is the
concatenation of its requests' new tokens, so prefilling prompts of any lengths and decoding one token each are the
same forward; they differ in the wrapper that runs attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter
from typing import Any, Iterator, Sequence

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import flashinfer

WORKSPACE_BYTES = 64 << 20


class PageAllocator:
    """Hand out the cache's pages from a free list."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages))

    def take(self) -> int:
        """Return the index of a page that no request holds; raises MemoryError when there is none."""
        if not self.free:
            raise MemoryError("the paged cache is full: ask for fewer tokens, or construct PagedLlama with more pages")
        return self.free.pop()

    def give_back(self, pages: list[int]) -> None:
        """Free all of `pages` and empty the list."""
        self.free.extend(pages)
        pages.clear()


@dataclass(eq=False)
class Request:
    """One prompt, what was answered so far, and the pages that hold both."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # [vocab] before each answered token
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache


@dataclass
class Timing:
    """Tokens and seconds of the two phases; the first answered token belongs to the prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """What all layers of one forward share: the page table (CSR), the new tokens' places, rotary tables, the plan."""

    kv_indptr: torch.Tensor  # int32 [batch + 1]
    kv_indices: torch.Tensor  # int32 [pages in use]
    last_page_len: torch.Tensor  # int32 [batch]
    batch_indices: torch.Tensor  # int32 [tokens]: request of each new token
    positions: torch.Tensor  # int32 [tokens]: its position in that request
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos and sin, [tokens, head_dim]
    wrapper: Any  # the planned prefill or decode wrapper


class PagedLlama:
    """Greedy generation of many requests at once with a transformers `LlamaForCausalLM`."""

    def __init__(self, model: Any, num_pages: int, page_size: int = 16) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.device, self.dtype, self.page_size = model, weight.device, weight.dtype, page_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = model.model.layers[0].self_attn.head_dim
        shape = (config.num_hidden_layers, num_pages, 2, page_size, self.kv_heads, self.head_dim)
        self.cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.allocator = PageAllocator(num_pages)
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        self.timing = Timing()

    def generate(self, requests: Sequence[Request], max_new_tokens: int, stop: int) -> Iterator[list[Request]]:
        """Answer `requests` as one batch; after each step yield those that got a token.

        A request leaves the batch after the token `stop` or after `max_new_tokens`, and its pages are free again.
        """
        running, tokens = list(requests), [request.prompt for request in requests]
        while running:
            begin = perf_counter()
            logits = self.forward(running, tokens)
            for request, row, token in zip(running, logits, logits.argmax(-1).tolist()):
                request.logits.append(row)
                request.answer.append(token)
            self._count(tokens, perf_counter() - begin)
            yield running
            finished = [r for r in running if r.answer[-1] == stop or len(r.answer) == max_new_tokens]
            for request in finished:
                self.allocator.give_back(request.pages)
            running = [request for request in running if request not in finished]
            tokens = [request.answer[-1:] for request in running]

    @torch.inference_mode()
    def forward(self, requests: Sequence[Request], tokens: Sequence[list[int]]) -> torch.Tensor:
        """Append `tokens[i]` to request i; return the logits after each request's last token, fp32 [batch, vocab]."""
        for request, new in zip(requests, tokens):
            request.cached += len(new)
            while len(request.pages) * self.page_size < request.cached:
                request.pages.append(self.allocator.take())
        llama = self.model.model
        counts = [len(new) for new in tokens]
        x = llama.embed_tokens(torch.tensor([token for new in tokens for token in new], device=self.device))
        step = self._plan(requests, counts, x)
        for layer, cache in zip(llama.layers, self.cache):
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), cache, step)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = torch.tensor(list(accumulate(counts)), device=self.device) - 1
        logits: torch.Tensor = self.model.lm_head(llama.norm(x[last])).float()
        return logits

    def _plan(self, requests: Sequence[Request], counts: list[int], x: torch.Tensor) -> Step:
        qo_indptr = self._int32([0, *accumulate(counts)])
        kv_indptr = self._int32([0, *accumulate(len(request.pages) for request in requests)])
        kv_indices = self._int32([page for request in requests for page in request.pages])
        last_page_len = self._int32([(request.cached - 1) % self.page_size + 1 for request in requests])
        seq_lens = flashinfer.get_seq_lens(kv_indptr, last_page_len, self.page_size)
        batch_indices, positions = flashinfer.get_batch_indices_positions(qo_indptr, seq_lens, sum(counts))
        cos, sin = self.model.model.rotary_emb(x[None], positions[None])
        table = (kv_indptr, kv_indices, last_page_len)
        shape = (self.heads, self.kv_heads, self.head_dim, self.page_size)
        decoding = max(counts) == 1
        if decoding:
            self.decode.plan(*table, *shape, q_data_type=self.dtype)
        else:
            self.prefill.plan(qo_indptr, *table, *shape, causal=True, q_data_type=self.dtype)
        wrapper = self.decode if decoding else self.prefill
        return Step(*table, batch_indices, positions, (cos[0], sin[0]), wrapper)

    def _attention(self, layer: Any, x: torch.Tensor, cache: torch.Tensor, step: Step) -> torch.Tensor:
        q = layer.q_proj(x).view(-1, self.heads, self.head_dim)
        k = layer.k_proj(x).view(-1, self.kv_heads, self.head_dim)
        v = layer.v_proj(x).view(-1, self.kv_heads, self.head_dim)
        q, k = apply_rotary_pos_emb(q, k, *step.rotary, unsqueeze_dim=1)
        table = (step.kv_indices, step.kv_indptr, step.last_page_len)
        flashinfer.append_paged_kv_cache(k, v, step.batch_indices, step.positions, cache, *table)
        projected: torch.Tensor = layer.o_proj(step.wrapper.run(q, cache).flatten(1))
        return projected

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _count(self, tokens: Sequence[list[int]], seconds: float) -> None:
        if max(map(len, tokens)) > 1:
            self.timing.prefill_tokens += sum(map(len, tokens))
            self.timing.prefill_seconds += seconds
        else:
            self.timing.decode_tokens += len(tokens)
            self.timing.decode_seconds += seconds
