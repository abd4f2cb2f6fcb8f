"""Booleans as bits, with FlashInfer's names, arguments and meaning; masks are kept in this form."""

from __future__ import annotations

from typing import Tuple

import torch

from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_int32, check_tensor

__all__ = ["packbits", "segment_packbits"]

_WEIGHTS = {"big": (128, 64, 32, 16, 8, 4, 2, 1), "little": (1, 2, 4, 8, 16, 32, 64, 128)}


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack eight booleans to a byte, as numpy.packbits does.

    x: bool [n], on any device. bitorder: big puts the first boolean in the highest bit, little in the lowest.
    Return uint8 [ceil(n / 8)]; missing booleans are 0. Raises InvalidArgumentError, InvalidTypeError.
    """
    weights = _weights(bitorder, x)
    padded = torch.nn.functional.pad(x.view(torch.uint8), (0, -x.shape[0] % 8))
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> Tuple[torch.Tensor, torch.Tensor]:
    """Pack segments of booleans, each to bytes of its own.

    x: bool [indptr[-1]]. indptr: int32 [segments + 1], where segments begin, on the same device. bitorder: as packbits.
    Return (uint8 [bytes of all], int32 [segments + 1], at which bytes segments begin). Reads the number of bytes, so it
    waits for a GPU. Raises InvalidArgumentError, InvalidTypeError.
    """
    check_int32("indptr", indptr)
    if indptr.shape[0] < 1 or indptr.device != x.device:
        raise InvalidArgumentError(
            f"indptr must have an element and be on {x.device}, got {tuple(indptr.shape)} on {indptr.device}"
        )
    begins = byte_indptr(indptr)
    return pack_segments(x, indptr, begins, int(begins[-1]), bitorder), begins


def byte_indptr(indptr: torch.Tensor) -> torch.Tensor:
    """Return at which bytes the packed segments begin, int32 [segments + 1]."""
    sizes = (indptr[1:] - indptr[:-1] + 7) // 8
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()


def pack_segments(
    x: torch.Tensor, indptr: torch.Tensor, begins: torch.Tensor, num_bytes: int, bitorder: str
) -> torch.Tensor:
    """Pack segments that begin at `indptr` to `num_bytes` bytes, at `begins`; reads nothing from the device."""
    weights = _weights(bitorder, x)
    byte = torch.arange(num_bytes, device=x.device)
    segment = torch.searchsorted(begins, byte, right=True) - 1
    first = indptr[segment] + (byte - begins[segment]) * 8
    end = indptr[segment + 1]
    packed = torch.zeros(num_bytes, dtype=torch.uint8, device=x.device)
    if x.shape[0] == 0:
        return packed
    for bit in range(8):  # one after another: indices of all bits at once would take 64 bytes for each of these
        index = first + bit
        value = x[index.clamp(max=x.shape[0] - 1)] & (index < end)
        packed += value * weights[bit]
    return packed


def _weights(bitorder: str, x: torch.Tensor) -> torch.Tensor:
    check_tensor("x", x, (None,), torch.bool)
    if bitorder not in _WEIGHTS:
        raise InvalidArgumentError(f"bitorder must be 'big' or 'little', got {bitorder!r}")
    return torch.tensor(_WEIGHTS[bitorder], dtype=torch.uint8, device=x.device)
