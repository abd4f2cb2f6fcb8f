"""What the compatible wrappers share: a workspace, the last plan and options, and the buffers of a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Optional, Tuple, Union, cast

import torch

from flashinfer_attention.call import Call, Signature, accept, baked_signature_of, keep, signature_of
from flashinfer_attention.checks import Problem, check_problem, refuse_capture
from flashinfer_attention.compat import LOG2_E, DataType, Scalars, options_of, refuse_variants
from flashinfer_attention.lengths import Lengths, Queries, paged_lengths
from flashinfer_attention.masks import Mask, MaskBuffers, batch_mask
from flashinfer_attention.ops import is_compiling, number_for, traced_run
from flashinfer_attention.options import NEUTRAL, Options, Scale
from flashinfer_attention.plan import Plan, plan_lengths
from flashinfer_attention.workspace import Workspace
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError
from flashinfer_core.tensors import (
    KeyValue,
    PagedCache,
    check_int32,
    check_integer,
    check_layout,
    check_readable,
    check_tensor,
    paged_key_value,
)

__all__ = ["DataType", "Output", "PagedWrapper", "Wrapper", "graph_buffer"]

Output = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
Scales = Tuple[Optional[Scale], Optional[Scale], Optional[Scale]]  # of q, k and v

_NO_SCALES = (None, None, None)


class Wrapper:
    """Plan once, run often. Subclasses translate arguments.

    `_causal`, `_sm_scale`, `_window_left`, `_logits_soft_cap` and the three workspace buffers have the names under
    which vLLM reads them.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, use_cuda_graph: bool) -> None:
        check_layout(kv_layout)
        self._kv_layout = kv_layout
        self._use_cuda_graph = bool(use_cuda_graph)
        self._workspace = Workspace(float_workspace_buffer, fixed=self._use_cuda_graph)
        self._mask_buffers: Optional[MaskBuffers] = None
        self._plan: Optional[Plan] = None
        self._options = NEUTRAL
        self._causal = False
        self._window_left = -1
        self._last_forward: Optional[Tuple[Any, ...]] = None
        self._calls: Dict[Signature, Tuple[Call, int]] = {}  # and how far behind keys values lie
        self._number = number_for(self)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Say whether plans keep to the buffers given, so that a captured graph replays with them."""
        return self._use_cuda_graph

    @property
    def device(self) -> torch.device:
        """Return the device of the workspace, on which everything runs."""
        return self._workspace.partial.device

    @property
    def _sm_scale(self) -> Optional[float]:
        return self._options.sm_scale

    @property
    def _logits_soft_cap(self) -> float:
        return self._options.logits_soft_cap

    @property
    def _float_workspace_buffer(self) -> torch.Tensor:
        return self._workspace.partial

    @property
    def _int_workspace_buffer(self) -> torch.Tensor:
        plan = self._workspace.plan
        return torch.empty(0, dtype=torch.uint8, device=self.device) if plan is None else plan

    @property
    def _pin_memory_int_workspace_buffer(self) -> torch.Tensor:
        host = self._workspace.host
        return torch.empty(0, dtype=torch.uint8, device="cpu") if host is None else host

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: Optional[torch.Tensor]
    ) -> None:
        """Replace both workspaces; plan again before the next run.

        float_workspace_buffer: uint8 [any], for split results; a smaller one costs splits. int_workspace_buffer:
        uint8 [any], for the work list; None: allocated. Graphs captured before keep the old buffers.
        Raises InvalidTypeError, InvalidArgumentError.
        """
        self._workspace = Workspace(float_workspace_buffer, int_workspace_buffer, fixed=self._use_cuda_graph)
        self._plan = None
        self._calls = {}

    def end_forward(self) -> None:
        """Do nothing; older versions freed the plan here."""

    def _take_mask_buffers(self, bits: Optional[torch.Tensor], indptr: Optional[torch.Tensor], size: int) -> None:
        """Keep the buffers of masks that a CUDA graph reads, both or none; `indptr` has `size` elements."""
        if not self._use_cuda_graph or (bits is None and indptr is None):
            return
        if bits is None:
            raise InvalidArgumentError("mask_indptr_buf was given, but custom_mask_buf is missing")
        check_tensor("custom_mask_buf", bits, (None,), torch.uint8, self.device)
        self._mask_buffers = MaskBuffers(bits, graph_buffer("mask_indptr_buf", indptr, self.device, size))

    def _mask(
        self, lengths: Lengths, custom_mask: Optional[torch.Tensor], packed_custom_mask: Optional[torch.Tensor]
    ) -> Optional[Mask]:
        """Return the mask of a batch, and make sure that a graph's buffers hold it."""
        if custom_mask is None and packed_custom_mask is None:
            return None
        mask = batch_mask(custom_mask, packed_custom_mask, lengths, self.device)
        if self._use_cuda_graph:
            if self._mask_buffers is None:
                raise InvalidArgumentError("use_cuda_graph=True with a mask needs custom_mask_buf and mask_indptr_buf")
            size, room = mask.bits.shape[0], self._mask_buffers.bits.shape[0]
            if size > room:
                raise WorkspaceError(f"the masks need {size} bytes, but custom_mask_buf has {room}")
        return mask

    def _planned(self) -> Plan:
        if self._plan is None:
            raise InvalidArgumentError("there is no plan yet", remedy="call plan() before run()")
        return self._plan

    def _take(self, plan: Plan, options: Options, mask: Optional[Mask] = None) -> None:
        """Replace the plan and its options, when nothing can fail any more."""
        if mask is not None and self._mask_buffers is not None:
            options = with_mask(options, self._mask_buffers.store(mask))
        self._plan, self._options = plan, options
        self._causal = plan.problem.causal
        self._window_left = plan.problem.window_left
        self._last_forward = None
        self._calls = {}

    def _forward(
        self,
        inputs: Tuple[Any, ...],
        causal: bool,
        window_left: int,
        scalars: Scalars,
        *,
        return_lse: bool,
        **scales: Any,
    ) -> Any:
        """Set all scalars anew, keep the mask, and run; plan the same lengths again where causal or window change."""
        wanted = (causal, window_left, scalars)
        if wanted != self._last_forward:
            self._set(bool(causal), window_left, scalars)
            self._last_forward = wanted
        return cast(Any, self).run(*inputs, return_lse=return_lse, **scales)

    def _set(self, causal: bool, window_left: int, scalars: Scalars) -> None:
        plan = self._planned()
        problem = plan.problem
        options = replace(options_of(scalars), mask=self._options.mask, mask_indptr=self._options.mask_indptr)
        options.check(problem, plan.lengths.num_requests)
        window_left = max(check_integer("window_left", window_left), -1)
        wanted = replace(problem, causal=causal and not problem.has_mask, window_left=window_left)
        if wanted != problem:
            check_problem(wanted)
            plan = plan_lengths(wanted, plan.page_size, plan.lengths, self._workspace)
        self._take(plan, options)

    def _run(
        self,
        q: torch.Tensor,
        kv: KeyValue,
        page_table: Optional[torch.Tensor],
        options: Options,
        signature: Optional[Signature],
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
    ) -> Output:
        """Check a call, keep it, and run it."""
        own_table = not self._use_cuda_graph
        call = accept(
            self._planned(),
            q,
            kv,
            page_table,
            options,
            lse_scale=LOG2_E,
            out=out,
            lse=lse,
            wants_lse=bool(return_lse),
            table_may_change=not own_table,
        )
        keep(self._calls, signature, (call, kv.v - kv.k))
        both = call.run(q, kv.k, kv.v, page_table, out, lse)
        return cast(Output, both if return_lse else both[0])


class PagedWrapper(Wrapper):
    """A wrapper over a paged cache."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        indptr_buffer: Optional[torch.Tensor],
        indices_buffer: Optional[torch.Tensor],
        last_page_len_buffer: Optional[torch.Tensor],
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._buffers: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = None
        self._page_table: Optional[torch.Tensor] = None
        if self._use_cuda_graph:
            indptr = graph_buffer("paged_kv_indptr_buffer", indptr_buffer, self.device)
            indices = graph_buffer("paged_kv_indices_buffer", indices_buffer, self.device)
            last = graph_buffer("paged_kv_last_page_len_buffer", last_page_len_buffer, self.device)
            if indptr.shape[0] != last.shape[0] + 1:
                raise InvalidArgumentError(
                    "paged_kv_indptr_buffer must have one element more than paged_kv_last_page_len_buffer, "
                    f"got {indptr.shape[0]} and {last.shape[0]}"
                )
            self._buffers = (indptr, indices, last)

    def _plan_pages(
        self,
        problem: Problem,
        page_size: int,
        queries: Queries,
        tables: Tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        options: Options,
        masks: Tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
        non_blocking: bool,
    ) -> None:
        """Plan over pages. tables: indptr, indices, last_page_len; masks: booleans and bits."""
        indptr, indices, last_page_len = tables
        check_int32("paged_kv_indices", indices)
        check_readable("paged_kv_indices", indices)
        lengths = paged_lengths(queries, indptr, last_page_len, page_size)
        entries = lengths.entries if lengths.source is None else indices.shape[0]  # known only on the GPU
        if indices.shape[0] < lengths.entries:
            raise InvalidArgumentError(f"indptr names {lengths.entries} pages, but indices has {indices.shape[0]}")
        self._check_room(lengths.num_requests, entries)
        refuse_capture(self.device)
        mask = self._mask(lengths, *masks)
        options = with_mask(options, mask)
        options.check(problem, lengths.num_requests)
        plan = plan_lengths(problem, page_size, lengths, self._workspace)
        # A copy of our own: callers may write the next step's pages into theirs.
        own = self._buffers[1] if self._buffers else indices.to(self.device, non_blocking=non_blocking, copy=True)
        self._store(indptr, indices, last_page_len, entries, non_blocking)
        self._page_table = own
        self._take(plan, options, mask)

    def _check_room(self, requests: int, entries: int) -> None:
        if self._buffers is None:
            return
        _, indices, last = self._buffers
        if requests != last.shape[0]:
            raise InvalidArgumentError(
                f"the CUDA graph is for batches of {last.shape[0]} requests, got {requests}",
                remedy="pad the batch with requests that have no pages",
            )
        if entries > indices.shape[0]:
            raise WorkspaceError(
                f"the batch has {entries} pages, but paged_kv_indices_buffer has room for {indices.shape[0]}"
            )

    def _store(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, entries: int, non_blocking: bool
    ) -> None:
        if self._buffers is None:
            return
        indptr_buffer, indices_buffer, last_buffer = self._buffers
        indptr_buffer.copy_(indptr, non_blocking=non_blocking)
        last_buffer.copy_(last_page_len, non_blocking=non_blocking)
        indices_buffer[:entries].copy_(indices[:entries], non_blocking=non_blocking)

    def _run_pages(
        self,
        q: torch.Tensor,
        cache: PagedCache,
        arguments: Tuple[Any, ...],
        scales: Scales,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
    ) -> Output:
        if is_compiling():
            refuse_variants("*args", arguments)
            return cast(Output, traced_run(self._number, q, cache, scales, out, lse, return_lse))
        signature = found = None
        keys: Any = cache
        values: Any = None
        try:
            if cache.__class__ is tuple:
                keys, values = cache
                caches = signature_of(keys) + signature_of(values)
            else:
                caches = signature_of(keys)
            signature = (
                (q.shape, q.stride(), q.dtype, q.device, caches, return_lse, arguments),
                None if out is None else signature_of(out),
                None if lse is None else signature_of(lse),
                None if scales == _NO_SCALES else tuple(map(baked_signature_of, scales)),
            )
            found = self._calls.get(signature)
        except (AttributeError, TypeError, ValueError):  # what is no tensor or no pair; named below
            pass
        if found is not None:
            call, value_offset = found
            k = keys.data_ptr()
            v = k + value_offset if values is None else values.data_ptr()
            both = call.run(q, k, v, self._page_table, out, lse)
            return cast(Output, both if return_lse else both[0])
        refuse_variants("*args", arguments)
        options = self._options
        if scales != _NO_SCALES:
            options = replace(options, q_scale=scales[0], k_scale=scales[1], v_scale=scales[2])
        kv = paged_key_value(cache, self._kv_layout, alike=False)
        return self._run(q, kv, self._page_table, options, signature, out, lse, return_lse)

    def _run_traced(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales, wants_lse: bool
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Run from a compiled graph."""
        both = self._run_pages(q, (k, v), (), scales, None, None, wants_lse)
        return both if isinstance(both, tuple) else (both, None)


def with_mask(options: Options, mask: Optional[Mask]) -> Options:
    """Return the options with a batch's mask, where there is one."""
    return options if mask is None else replace(options, mask=mask.bits, mask_indptr=mask.indptr)


def graph_buffer(
    name: str, buffer: Optional[torch.Tensor], device: torch.device, size: Optional[int] = None
) -> torch.Tensor:
    """Return a buffer that use_cuda_graph needs, of `size` elements where given, or raise."""
    if buffer is None:
        raise InvalidArgumentError(f"use_cuda_graph=True needs {name}")
    check_int32(name, buffer, size)
    if buffer.device != device:
        raise InvalidArgumentError(f"{name} must be on {device}, got {buffer.device}")
    return buffer
