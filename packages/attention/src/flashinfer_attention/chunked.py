"""Recursive attention: keys and values that arrive in pieces, and one running state between them.

Each piece gives a state (o, lse) of the queries over its keys; states merge in any order (states.py), so only the
running state is kept, in fp32, and a piece may be freed or overwritten as soon as it was added.
"""

from __future__ import annotations

from typing import Any, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

from flashinfer_attention.attention import attention
from flashinfer_attention.plan import plan_attention
from flashinfer_attention.states import RunningState
from flashinfer_attention.workspace import Workspace
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_int32, check_integer, check_readable, check_tensor


class _Part(NamedTuple):
    """Rows of q, all requests in order, over a piece: row counts with the piece's keys between such without keys."""

    rows: List[Tuple[int, int, int]]  # of each request: before, with keys, after
    causal: bool


class ChunkedAttention:
    """Attention of a batch of queries over keys that arrive in pieces; add all pieces, then take the result.

    q: [tokens, num_qo_heads, head_dim]. num_kv_heads: of the pieces. head_dim_vo: columns of v; None: head_dim.
    q_indptr: int32 [B + 1], rows of q of each request; None: one request. first_key: for a causal mask, the position
    among all its keys that the first query of each request sees as its last: kv_len - q_len where queries are the last
    tokens; an integer, or one for each request. None: every query sees every key. Options of `attention`, as sm_scale,
    but windows, ALiBi, RoPE and masks, hold for all pieces; sinks count once.
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """

    def __init__(
        self,
        q: torch.Tensor,
        *,
        num_kv_heads: int,
        head_dim_vo: Optional[int] = None,
        q_indptr: Optional[torch.Tensor] = None,
        first_key: Optional[Sequence[int]] = None,
        workspace: Optional[torch.Tensor] = None,
        sinks: Optional[torch.Tensor] = None,
        sm_scale: Optional[float] = None,
        logits_soft_cap: float = 0.0,
    ) -> None:
        check_tensor("q", q, (None, None, None))
        self._q = q
        self._rows = [0, q.shape[0]] if q_indptr is None else _listed("q_indptr", q_indptr)
        if self._rows[-1] != q.shape[0]:
            raise InvalidArgumentError(f"q_indptr must end with the {q.shape[0]} rows of q, got {self._rows[-1]}")
        self._first_key = None if first_key is None else [check_integer("first_key", key) for key in first_key]
        requests = len(self._rows) - 1
        if self._first_key is not None and len(self._first_key) != requests:
            raise InvalidArgumentError(f"first_key must have {requests} elements, got {len(self._first_key)}")
        self._done = [0] * requests
        self._kv_heads = num_kv_heads
        self._width = q.shape[2] if head_dim_vo is None else head_dim_vo
        self._workspace = workspace
        self._sinks = sinks
        self._options = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
        self._total = RunningState(q.shape[0], q.shape[1], self._width, q.device)

    def add(self, k: torch.Tensor, v: torch.Tensor, *, kv_indptr: Optional[torch.Tensor] = None) -> None:
        """Attend to the next keys of each request.

        k: [rows, num_kv_heads, head_dim]; v: [rows, num_kv_heads, head_dim_vo]. kv_indptr: int32 [B + 1], rows of each
        request; None where there is one request. Asynchronous on GPUs, in torch's current stream.
        """
        check_tensor("k", k, (None, self._kv_heads, self._q.shape[2]))
        rows = [0, k.shape[0]] if kv_indptr is None else _listed("kv_indptr", kv_indptr)
        if len(rows) != len(self._rows):
            raise InvalidArgumentError(f"kv_indptr must have {len(self._rows)} elements, got {len(rows)}")
        lengths = [end - begin for begin, end in zip(rows, rows[1:])]
        for part in self._parts(lengths):
            self._total.add(*self._attend(k, v, rows, part))
        self._done = [done + length for done, length in zip(self._done, lengths)]

    def result(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return (o as q, lse in natural logarithm) over the keys so far; more may be added afterwards."""
        return self._total.o.to(self._q.dtype), self._total.lse.clone()

    def _parts(self, lengths: Sequence[int]) -> List[_Part]:
        """Divide each request's rows by what they see of its piece: nothing, a part that grows by row, or all."""
        seen_in_part: List[Tuple[int, int, int]] = []
        seen_whole: List[Tuple[int, int, int]] = []
        for request, length in enumerate(lengths):
            q_len = self._rows[request + 1] - self._rows[request]
            # Row i sees `first + i` and all before it, counted from the start of this piece.
            first = length if self._first_key is None else self._first_key[request] - self._done[request]
            blind = min(max(-first, 0), q_len) if length else q_len
            partial = min(max(length - 1 - first, blind), q_len)
            seen_in_part.append((blind, partial - blind, q_len - partial))
            seen_whole.append((partial, q_len - partial, 0))
        parts = [_Part(seen_whole, False)] if any(rows for _, rows, _ in seen_whole) else []
        if any(rows for _, rows, _ in seen_in_part):
            parts.append(_Part(seen_in_part, True))
        return parts

    def _attend(
        self, k: torch.Tensor, v: torch.Tensor, kv_rows: Sequence[int], part: _Part
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the state of all rows over the piece; those that `part` leaves out get the unit."""
        q_indptr, kv_indptr, kv_len = [0], [0], []
        for request, (before, rows, after) in enumerate(part.rows):
            begin, end = kv_rows[request], kv_rows[request + 1]
            first = 0 if self._first_key is None else self._first_key[request] - self._done[request]
            # The last of these rows sees the last key counted here: the mask is aligned to it.
            visible = min(first + before + rows, end - begin) if part.causal else end - begin
            for count, keys, until in ((before, 0, begin), (rows, visible, end), (after, 0, end)):
                q_indptr.append(q_indptr[-1] + count)
                kv_indptr.append(until)
                kv_len.append(keys if count else 0)
        plan = plan_attention(
            q_indptr=_int32(q_indptr),
            kv_indptr=_int32(kv_indptr),
            kv_len=_int32(kv_len),
            num_qo_heads=self._q.shape[1],
            num_kv_heads=self._kv_heads,
            head_dim=self._q.shape[2],
            head_dim_vo=self._width,
            causal=part.causal,
            dtype=self._q.dtype,
            kv_dtype=k.dtype,
            device=self._q.device,
            workspace=None if self._workspace is None else Workspace(self._workspace),
        )
        sinks, self._sinks = self._sinks, None
        options: Any = {**self._options, "sinks": sinks}
        return attention(self._q, k, v, plan=plan, **options)


def chunked_attention(
    q: torch.Tensor,
    pieces: Iterable[Tuple[torch.Tensor, torch.Tensor]],
    *,
    num_kv_heads: int,
    causal: bool = False,
    kv_len: Optional[int] = None,
    **options: Any,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attend from one request's q over keys and values that an iterable brings piece by piece.

    q: [q_len, num_qo_heads, head_dim]. pieces: of (k [rows, num_kv_heads, head_dim], v), in order; one at a time is
    held. causal: query i sees keys up to i + kv_len - q_len, where kv_len is the number of keys in all pieces. options:
    as ChunkedAttention. Return (o as q, lse in natural logarithm).
    Raises InvalidArgumentError, InvalidTypeError, UnsupportedOptionError.
    """
    if causal and kv_len is None:
        raise InvalidArgumentError("causal=True needs kv_len, the number of keys in all pieces")
    first_key = [kv_len - q.shape[0]] if causal and kv_len is not None else None
    chunked = ChunkedAttention(q, num_kv_heads=num_kv_heads, first_key=first_key, **options)
    for k, v in pieces:
        chunked.add(k, v)
    return chunked.result()


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _listed(name: str, lengths: torch.Tensor) -> List[int]:
    check_int32(name, lengths)
    check_readable(name, lengths)
    rows = [int(row) for row in lengths.tolist()]
    if not rows or rows[0] != 0 or any(end < begin for begin, end in zip(rows, rows[1:])):
        raise InvalidArgumentError(f"{name} must begin with 0 and not decrease, got {rows}")
    return rows
