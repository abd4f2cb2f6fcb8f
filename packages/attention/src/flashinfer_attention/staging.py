"""Pinned host memory from which work lists are copied to a GPU.

The copy is asynchronous, so what it reads must stay as it is until it has run; an event behind each copy says when. A
buffer whose copy is still waiting is left alone and another one is taken: planning never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, List

import torch


@dataclass
class Slot:
    """A buffer, and the event behind the last copy from it."""

    buffer: torch.Tensor
    sent: Any


class Staging:
    """Hold as many buffers as copies are waiting. `allocate` and `event` make what a slot is made of."""

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor] = lambda size: torch.empty(
            size, dtype=torch.uint8, device="cpu", pin_memory=True
        ),
        event: Callable[[], Any] = torch.cuda.Event,
    ) -> None:
        self._allocate = allocate
        self._event = event
        self._slots: List[Slot] = []

    def take(self, size: int) -> Slot:
        """Return a slot of `size` bytes or more that no copy reads; record `sent` behind the next copy from it."""
        for index, slot in enumerate(self._slots):
            if slot.sent.query():
                # The one used last is asked last: its copy is the youngest.
                self._slots.append(self._slots.pop(index))
                if slot.buffer.numel() < size:
                    slot.buffer = self._allocate(max(size, 2 * slot.buffer.numel()))
                return slot
        self._slots.append(Slot(self._allocate(size), self._event()))
        return self._slots[-1]
