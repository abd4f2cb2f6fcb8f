"""What the compatible wrappers share: a workspace, the last plan, and the buffers of a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Optional, Tuple, Union, cast

import torch

from flashinfer_attention.attention import run
from flashinfer_attention.checks import make_problem, refuse_capture
from flashinfer_attention.compat import LOG2_E, check_arguments, check_options
from flashinfer_attention.lengths import Queries, paged_lengths
from flashinfer_attention.options import Options
from flashinfer_attention.plan import Plan, plan_lengths
from flashinfer_attention.workspace import Workspace
from flashinfer_core.errors import InvalidArgumentError, WorkspaceError
from flashinfer_core.tensors import KeyValue, PagedCache, check_int32, check_layout, check_readable, paged_key_value

DataType = Union[str, torch.dtype]
Output = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]


class Scalars(NamedTuple):
    """What `plan` fixes and `forward` may set anew, beside the mask."""

    sm_scale: Optional[float]
    window_left: int
    logits_soft_cap: Optional[float]


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
        self._plan: Optional[Plan] = None
        self._causal = False
        self._sm_scale: Optional[float] = None
        self._window_left = -1
        self._logits_soft_cap = 0.0

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Say whether plans keep to the buffers given, so that a captured graph replays with them."""
        return self._use_cuda_graph

    @property
    def device(self) -> torch.device:
        """Return the device of the workspace, on which everything runs."""
        return self._workspace.partial.device

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

    def end_forward(self) -> None:
        """Do nothing; older versions freed the plan here."""

    def _planned(self) -> Plan:
        if self._plan is None:
            raise InvalidArgumentError("there is no plan yet", remedy="call plan() before run()")
        return self._plan

    def _take(self, plan: Plan, scalars: Scalars) -> None:
        """Replace the plan, when nothing can fail any more."""
        self._plan = plan
        self._causal = plan.problem.causal
        self._sm_scale, self._window_left = scalars.sm_scale, scalars.window_left
        self._logits_soft_cap = scalars.logits_soft_cap or 0.0

    def _forward(
        self, inputs: Tuple[Any, ...], causal: bool, scalars: Scalars, options: Any, *, return_lse: bool, **scales: Any
    ) -> Any:
        """Set mask and scalars anew and run; plan the same lengths again where the mask changes."""
        check_options(**options, **scalars._asdict())
        plan = self._planned()
        if plan.problem.causal != causal:
            problem = replace(plan.problem, causal=bool(causal))
            plan = plan_lengths(problem, plan.page_size, plan.lengths, self._workspace)
        self._take(plan, scalars)
        return cast(Any, self).run(*inputs, return_lse=return_lse, **scales)

    def _run(
        self,
        q: torch.Tensor,
        kv: KeyValue,
        page_table: Optional[torch.Tensor],
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
    ) -> Output:
        plan, options = self._planned(), Options(sm_scale=self._sm_scale)
        both = run(plan, q, kv, page_table, options, lse_scale=LOG2_E, out=out, lse=lse, wants_lse=return_lse)
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
        queries: Queries,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool,
        dtype: torch.dtype,
        scalars: Scalars,
        non_blocking: bool,
    ) -> None:
        check_int32("paged_kv_indices", indices)
        check_readable("paged_kv_indices", indices)
        problem = make_problem(num_qo_heads, num_kv_heads, head_dim, causal, dtype, self.device)
        lengths = paged_lengths(queries, indptr, last_page_len, page_size)
        if indices.shape[0] < lengths.entries:
            raise InvalidArgumentError(f"indptr names {lengths.entries} pages, but indices has {indices.shape[0]}")
        self._check_room(lengths.num_requests, lengths.entries)
        refuse_capture(self.device)
        page_table = self._buffers[1] if self._buffers else indices.to(self.device, non_blocking=non_blocking)
        plan = plan_lengths(problem, page_size, lengths, self._workspace)
        self._store(indptr, indices, last_page_len, lengths.entries, non_blocking)
        self._page_table = page_table
        self._take(plan, scalars)

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
        scales: Tuple[Optional[float], Optional[float], Optional[float]],
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
    ) -> Output:
        if arguments:
            check_arguments(arguments)
        if scales != (None, None, None):
            check_options(q_scale=scales[0], k_scale=scales[1], v_scale=scales[2])
        return self._run(q, paged_key_value(cache, self._kv_layout), self._page_table, out, lse, return_lse)


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
