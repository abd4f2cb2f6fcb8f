"""What every operator asks of tensors that it writes, and of the device that it runs on; O(1) in the data.

A remedy never names a conversion, as those of inputs do: what is written to a copy is lost.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch

from flashinfer_core.errors import InvalidArgumentError, UnsupportedDeviceError
from flashinfer_core.tensors import check_tensor


def check_output(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[Optional[int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    contiguous: bool = False,
) -> None:
    """Raise unless `tensor` can be written: as `check_tensor`, and every element has memory of its own.

    shape: None means any size. contiguous: asks for rows that follow one another too.
    """
    sizes = ", ".join("n" if size is None else str(size) for size in shape)
    remedy = f"it is written in place, so allocate it so: torch.empty({sizes}, dtype={dtype}, device='{device}')"
    check_tensor(name, tensor, shape, dtype, device, remedy=remedy)
    if tensor.is_contiguous():
        return
    if contiguous:
        raise InvalidArgumentError(f"{name} must be contiguous, got strides {tensor.stride()}", remedy=remedy)
    check_apart(name, tensor, remedy)


def check_apart(name: str, tensor: torch.Tensor, remedy: str = "allocate it with torch.empty") -> None:
    """Raise where elements of `tensor` share memory, as those of an expanded tensor do.

    Dimensions must nest: the stride of each reaches past all of the smaller ones.
    """
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reached and tensor.numel() > 0:
            raise InvalidArgumentError(
                f"elements of {name} share memory: it has shape {tuple(tensor.shape)} and strides {tensor.stride()}",
                remedy=remedy,
            )
        reached += stride * (size - 1)


def check_runs(name: str, device: torch.device) -> None:
    """Raise UnsupportedDeviceError unless kernels run on the device of the argument `name`."""
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedDeviceError(
            f"{name} is on {device}, and there are no kernels for it", remedy="use a CPU or a CUDA device"
        )
