"""Custom masks of a batch: from booleans or bits, as callers have them, to the bits that kernels read."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, cast

import torch

from flashinfer_attention.lengths import Lengths
from flashinfer_attention.quantization import pack_segments, packbits
from flashinfer_core.errors import InvalidArgumentError
from flashinfer_core.tensors import check_tensor

_INT32_MAX = 2**31 - 1


class Mask(NamedTuple):
    """bits: uint8, [q_len, kv_len] of each request, lowest bit first; indptr: int32 [B + 1], where requests begin."""

    bits: torch.Tensor
    indptr: torch.Tensor


class MaskBuffers(NamedTuple):
    """Where a CUDA graph reads masks: uint8 [any], and int32 [B + 1]."""

    bits: torch.Tensor
    indptr: torch.Tensor

    def store(self, mask: Mask) -> Mask:
        """Copy a mask here, and return it from here."""
        self.bits[: mask.bits.shape[0]].copy_(mask.bits, non_blocking=True)
        self.indptr.copy_(mask.indptr, non_blocking=True)
        return Mask(self.bits, self.indptr)


def batch_mask(
    custom_mask: Optional[torch.Tensor],
    packed_custom_mask: Optional[torch.Tensor],
    lengths: Lengths,
    device: torch.device,
) -> Mask:
    """Return the mask of a batch, a copy of our own on `device`.

    custom_mask: bool, [q_len, kv_len] of each request, row-major, one after another. packed_custom_mask: uint8, the
    same as bits, lowest first, each request from a byte of its own; it wins.
    """
    q_indptr = lengths.q_indptr
    sizes = (q_indptr[1:] - q_indptr[:-1]).long() * lengths.kv_len
    indptr, begins = _running(sizes), _running((sizes + 7) // 8)
    num_bytes = int(begins[-1])
    if num_bytes > _INT32_MAX:
        raise InvalidArgumentError(f"the masks of the batch take {num_bytes} bytes, more than int32 counts")
    if packed_custom_mask is not None:
        check_tensor("packed_custom_mask", packed_custom_mask, (None,), torch.uint8)
        if packed_custom_mask.shape[0] < num_bytes:
            raise InvalidArgumentError(
                f"packed_custom_mask must have at least {num_bytes} bytes, got {packed_custom_mask.shape[0]}"
            )
        return Mask(packed_custom_mask[:num_bytes].to(device, copy=True), begins.int().to(device))
    mask = cast(torch.Tensor, custom_mask)
    check_tensor("custom_mask", mask, (int(indptr[-1]),), torch.bool)
    bits = pack_segments(mask, indptr.to(mask.device), begins.to(mask.device), num_bytes, "little")
    return Mask(bits.to(device), begins.int().to(device))


def _running(sizes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def single_mask(
    custom_mask: Optional[torch.Tensor], packed_custom_mask: Optional[torch.Tensor], shape: Tuple[int, int]
) -> Optional[torch.Tensor]:
    """Return the bits of one request's mask: bool [q_len, kv_len], or uint8 [ceil(q_len * kv_len / 8)], which wins."""
    if packed_custom_mask is not None:
        check_tensor("packed_custom_mask", packed_custom_mask, (None,), torch.uint8)
        return packed_custom_mask
    if custom_mask is None:
        return None
    check_tensor("custom_mask", custom_mask, shape, torch.bool)
    return packbits(custom_mask.flatten(), "little")
