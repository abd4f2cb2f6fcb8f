"""Memory that plans write into, owned by the caller, and how much of it a problem can use.

Splits adapt to the partial buffer, so no size is too small for it; only the work list of a CUDA graph can outgrow its
buffer, and that is checked.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any, List, Optional, Union

import torch

from flashinfer_attention.checks import Problem, check_heads, refuse
from flashinfer_attention.launch import Kernels, Partial, fixed_piece, partial_bytes
from flashinfer_attention.staging import Slot, Staging
from flashinfer_attention.variants import CPU_WORKERS_PER_THREAD, SHARED_LIMITS, AnyAttention, Attention, choose
from flashinfer_core import planner
from flashinfer_core.device import num_threads
from flashinfer_core.errors import InvalidArgumentError, InvalidTypeError, WorkspaceError


@dataclass(frozen=True)
class Frozen:
    """What a captured CUDA graph holds by value, and so what later plans must keep."""

    problem: Problem
    page_size: Optional[int]
    kernels: Kernels
    partial: Partial
    limits: planner.PlanLimits


class Workspace:
    """Hold the buffers of one sequence of plans.

    partial: uint8 [any], on the device of the problem; where split results wait for the merge. plan: uint8 or int32
    [any] on the same device, for the work list; None: allocated, and replaced when a plan needs more. fixed: keep
    addresses, kernels and grid of the first plan, so that a captured CUDA graph replays with every later one; the work
    list then has room for the first plan's tokens and requests with any lengths.
    On a GPU a workspace belongs to one stream at a time, and holds one work list: a newer plan ends the older ones.
    What a graph captured without `fixed` is kept as long as the workspace, and a later plan gets another work list.
    On CPUs work lists belong to their plans, and threads may run plans of one workspace at once.
    Raises InvalidTypeError, InvalidArgumentError.
    """

    def __init__(self, partial: torch.Tensor, plan: Optional[torch.Tensor] = None, *, fixed: bool = False) -> None:
        _check_buffer("float_workspace_buffer", partial)
        if plan is not None:
            _check_buffer("int_workspace_buffer", plan)
            if plan.device != partial.device or plan.data_ptr() % 16:
                raise InvalidArgumentError(
                    f"int_workspace_buffer must be on {partial.device} and start at a multiple of 16 bytes, "
                    f"got {plan.device}, address {plan.data_ptr():#x}"
                )
        self.partial = partial.view(torch.uint8)
        self.plan = None if plan is None else plan.view(torch.uint8)
        self.grows = plan is None
        self.fixed = fixed
        self.frozen: Optional[Frozen] = None
        self.max_tokens = 0
        self.is_captured = False
        self.host: Optional[torch.Tensor] = None
        # Counts what was written to `plan`.
        self.generation = 0
        # Whoever runs on a CPU takes `partial` with this, or has a buffer of its own.
        self.partial_lock = threading.Lock()
        self._staging = Staging()
        self._captured: List[Any] = []

    def stage(self, size: int) -> Slot:
        """Return host memory of `size` bytes or more for a plan, pinned unless the plan stays there."""
        if self.partial.device.type == "cpu":
            slot = Slot(torch.empty(size, dtype=torch.uint8, device="cpu"), None)
        else:
            slot = self._staging.take(size)
        self.host = slot.buffer
        return slot

    def upload(self, slot: Slot, used: int, needed: int) -> torch.Tensor:
        """Copy `used` bytes of a plan to a buffer of at least `needed`, asynchronously; on a CPU, keep it there."""
        if slot.sent is None:
            return slot.buffer
        buffer = self.receive(needed)
        buffer[:used].copy_(slot.buffer[:used], non_blocking=True)
        device = buffer.device
        slot.sent.record(torch.cuda.current_stream(device) if device.type == "cuda" else None)
        return buffer

    def receive(self, needed: int) -> torch.Tensor:
        """Return a buffer of `needed` bytes or more, into which a plan is written now."""
        buffer = self._reserve(needed)
        self.generation += 1
        return buffer

    def _reserve(self, needed: int) -> torch.Tensor:
        if self.is_captured and not self.fixed:
            self._leave_to_graph()
        held = 0 if self.plan is None else self.plan.numel()
        if self.plan is not None and needed <= held:
            return self.plan
        if not self.grows:
            raise WorkspaceError(
                f"the work list needs {needed} bytes, but the int workspace has {held}",
                remedy=f"pass reset_workspace_buffer() an int workspace of {needed} bytes or more",
            )
        if self.frozen is not None:
            raise WorkspaceError(
                f"the work list needs {needed} bytes, but that of the CUDA graph has {held}",
                remedy="plan the batch with most tokens and requests first: a graph keeps its first buffers",
            )
        # Doubling keeps growing batches from allocating in every step.
        self.plan = torch.empty(max(needed, 2 * held), dtype=torch.uint8, device=self.partial.device)
        return self.plan

    def _leave_to_graph(self) -> None:
        if not self.grows:
            raise WorkspaceError(
                "a CUDA graph was captured with the work list in the int workspace",
                remedy="pass reset_workspace_buffer() another one, or capture with use_cuda_graph=True",
            )
        self.plan = None
        self.is_captured = False

    def freeze(self, frozen: Frozen, tokens: int) -> None:
        """Keep what a CUDA graph captured from now on holds by value."""
        self.frozen = frozen
        self.max_tokens = tokens

    def check_fits(self, problem: Problem, page_size: Optional[int], tokens: int) -> None:
        """Raise unless a plan of these facts can replace the first one of a fixed workspace."""
        if self.frozen is None:
            return
        was = (self.frozen.problem, self.frozen.page_size)
        # Until a graph holds them, causal and window may still change.
        free = replace(was[0], causal=problem.causal, window_left=problem.window_left)
        first = was[0] if self.is_captured else free
        if (first, was[1]) != (problem, page_size):
            raise InvalidArgumentError(
                f"a CUDA graph keeps what it was planned with: {was[0]}, page_size={was[1]}; "
                f"got {problem}, page_size={page_size}",
                remedy="make another wrapper for another problem",
            )
        if tokens > self.max_tokens:
            raise WorkspaceError(
                f"the plan has {tokens} query tokens, but the CUDA graph was planned or captured with "
                f"{self.max_tokens}",
                remedy="plan and capture the batch with most tokens first",
            )

    def check_generation(self, work: torch.Tensor, generation: int) -> None:
        """Raise where a newer plan was written over the work list that was uploaded as this generation."""
        if generation != self.generation and work is self.plan:
            raise WorkspaceError(
                "a newer plan has replaced this one in their workspace",
                remedy="run the newest plan, or give each plan a workspace of its own",
            )

    def note_capture(self, rows: int, held: Any) -> None:
        """Remember that a graph now holds a q and o of `rows` rows, and keep alive what it reads of ours."""
        self.is_captured = True
        self.max_tokens = min(self.max_tokens, rows)
        self._captured.append(held)


def _check_buffer(name: str, buffer: torch.Tensor) -> None:
    if not isinstance(buffer, torch.Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(buffer).__name__}")
    if buffer.dim() != 1 or not buffer.is_contiguous():
        raise InvalidArgumentError(f"{name} must be a contiguous vector, got shape {tuple(buffer.shape)}")


def workspace_bytes(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: Optional[int] = None,
    max_q_len: int = 1,
    deterministic: bool = False,
    max_requests: int = 1,
    max_kv_len: int = 1,
    device: Union[torch.device, str] = "cuda",
    num_sms: Optional[int] = None,
) -> int:
    """Return the bytes of partial buffer beyond which no plan of these maxima splits any better.

    It does not depend on batch size or KV lengths: pieces are bounded by the workers. Less is legal and costs splits.
    A deterministic plan splits each request by itself, so its bytes depend on max_requests and max_kv_len too, and with
    less it may fail; max_q_len is then the one given to `plan_attention`.
    num_sms: streaming multiprocessors of the GPU, or threads of the CPU; None: those of `device`. With it given nothing
    is asked of a GPU. Raises InvalidArgumentError, UnsupportedOptionError.
    """
    check_heads(num_qo_heads, num_kv_heads)
    where = torch.device(device)
    if num_sms is None:
        num_sms = (
            num_threads() if where.type == "cpu" else torch.cuda.get_device_properties(where).multi_processor_count
        )
    vo = head_dim if head_dim_vo is None else head_dim_vo
    problem = Problem(num_qo_heads, num_kv_heads, head_dim, vo, False, torch.float16, torch.float16, where)
    refuse(problem, ())
    rows_of = max_q_len * problem.group
    variants = [
        choose(target, dtype="bf16", kv_dtype="bf16", head_dim=head_dim, head_dim_vo=vo, max_rows=rows_of)
        for target in (("x86_64_v2", "x86_64_amx") if problem.is_cpu else SHARED_LIMITS)
    ]
    if deterministic:
        rows = [max_requests * _fixed_rows(problem, variant, max_q_len, max_kv_len) for variant in variants]
    else:
        rows = [
            planner.useful_partial_rows(
                variant.tile_rows,
                num_sms * (variant.max_ctas if isinstance(variant, Attention) else CPU_WORKERS_PER_THREAD),
            )
            for variant in variants
        ]
    return partial_bytes(max(rows), vo)


def _fixed_rows(problem: Problem, variant: AnyAttention, max_q_len: int, max_kv_len: int) -> int:
    """Return the partial rows of one request at most, where pieces are fixed."""
    group, kv_heads = problem.group, problem.num_kv_heads
    if variant.packs_all_heads:
        group, kv_heads = problem.num_qo_heads, 1
    piece = fixed_piece(variant.kv_tile)
    shape = planner.Shape(group, kv_heads, variant.tile_rows, variant.kv_tile, False, 1, fixed_piece=piece)
    return planner.most_fixed_rows(shape, max_q_len=max_q_len, max_kv_len=max_kv_len)
