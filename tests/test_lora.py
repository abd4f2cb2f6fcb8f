"""`add_lora` against fp64: dtypes, ranks, strides, tokens without an adapter, bad input."""

from __future__ import annotations

from typing import Optional

import pytest
import torch

from flashinfer_core.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedDeviceError,
    UnsupportedOptionError,
)
from flashinfer_lora import add_lora

# Half a unit in the last place of y, plus the rounding of fp32 sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float16, torch.bfloat16]


def reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    scales: Optional[torch.Tensor],
) -> torch.Tensor:
    out = y.double().clone()
    for token, adapter in enumerate(indices.tolist()):
        if 0 <= adapter < a.shape[0]:
            scale = 1.0 if scales is None else scales[adapter].double()
            out[token] += scale * (b[adapter].double() @ (a[adapter].double() @ x[token].double()))
    return out


def check(
    device: str,
    dtype: torch.dtype,
    *,
    tokens: int = 7,
    adapters: int = 3,
    rank: int = 16,
    sizes: tuple[int, int] = (96, 80),
    scaled: bool = True,
) -> None:
    def draw(*shape: int) -> torch.Tensor:
        # Rows sit inside wider ones whose rest is NaN: a read outside the row shows.
        wide = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), device=device, dtype=dtype)
        wide[..., : shape[-1]] = torch.randn(shape, device=device).to(dtype)
        return wide[..., : shape[-1]]

    x, y = draw(tokens, sizes[0]), draw(tokens, sizes[1])
    a, b = draw(adapters, rank, sizes[0]), draw(adapters, sizes[1], rank)
    indices = torch.randint(-1, adapters + 1, (tokens,), device=device, dtype=torch.int32)
    scales = torch.rand(adapters, device=device) if scaled else None
    expected = reference(y, x, a, b, indices, scales)
    assert add_lora(y, x, a=a, b=b, indices=indices, scales=scales) is y
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16"])
@pytest.mark.parametrize("rank", [1, 7, 8, 64, 512], ids=lambda rank: f"rank{rank}")
def test_ranks(device: str, dtype: torch.dtype, rank: int) -> None:
    check(device, dtype, rank=rank)


@pytest.mark.parametrize("tokens", [0, 1, 129], ids=lambda tokens: f"tokens{tokens}")
@pytest.mark.parametrize("sizes", [(8, 1), (264, 1000)], ids=["8to1", "264to1000"])
def test_sizes(device: str, tokens: int, sizes: tuple[int, int]) -> None:
    check(device, torch.float16, tokens=tokens, sizes=sizes, scaled=False)


def test_fp32_on_cpu() -> None:
    check("cpu", torch.float32, rank=9)


def test_no_adapter_leaves_y_alone(device: str) -> None:
    y = torch.randn(4, 32, device=device).half()
    before = y.clone()
    x, a, b = torch.randn(4, 64).half(), torch.randn(2, 8, 64).half(), torch.randn(2, 32, 8).half()
    indices = torch.tensor([-1, 2, -7, 2**31 - 1], dtype=torch.int32, device=device)
    add_lora(y, x.to(device), a=a.to(device), b=b.to(device), indices=indices)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(4, 60).half()}, InvalidArgumentError, "a must have shape"),
        ({"x": torch.zeros(4, 64)}, InvalidTypeError, "y must be torch.float32"),
        ({"b": torch.zeros(2, 32, 9).half()}, InvalidArgumentError, "b must have shape"),
        ({"indices": torch.zeros(4, dtype=torch.int64)}, InvalidTypeError, "indices must be torch.int32"),
        ({"indices": torch.zeros(3, dtype=torch.int32)}, InvalidArgumentError, "indices must have shape"),
        ({"scales": torch.ones(3)}, InvalidArgumentError, "scales must have shape"),
        ({"x": torch.zeros(4, 65).half()[:, 1:]}, InvalidArgumentError, "multiples of 16 bytes"),
        (
            {"x": torch.zeros(4 * 64 + 1).half()[1:].view(4, 64)},
            InvalidArgumentError,
            r"an address 2 bytes past one\ncall \.clone\(memory_format=torch\.contiguous_format\) on it",
        ),
        (
            {"y": torch.zeros(1, 32).half().expand(4, 32)},
            InvalidArgumentError,
            r"elements of y share memory(.|\n)*torch\.empty\(4, n, dtype=torch\.float16, device='cpu'\)",
        ),
        (
            {"y": torch.zeros(4, 32)},
            InvalidTypeError,
            r"y must be torch\.float16, got torch\.float32\nit is written in place, so allocate it so: torch\.empty",
        ),
        (
            {"x": torch.zeros(4, 64, device="meta").half()},
            UnsupportedDeviceError,
            "x is on meta, and there are no kernels for it",
        ),
        ({"x": torch.zeros(4, 64).double()}, InvalidTypeError, "x must be float16, bfloat16 or"),
    ],
    ids=[
        "in",
        "x-dtype",
        "rank",
        "int64",
        "tokens",
        "scales",
        "stride",
        "alignment",
        "expanded",
        "y-dtype",
        "device",
        "double",
    ],
)
def test_bad_input(change: dict[str, torch.Tensor], error: type[Exception], text: str) -> None:
    arguments = {
        "y": torch.zeros(4, 32).half(),
        "x": torch.zeros(4, 64).half(),
        "a": torch.zeros(2, 8, 64).half(),
        "b": torch.zeros(2, 32, 8).half(),
        "indices": torch.zeros(4, dtype=torch.int32),
    }
    with pytest.raises(error, match=text):
        add_lora(**{**arguments, **change})


@pytest.mark.gpu
def test_fp32_is_refused_on_a_gpu() -> None:
    x = torch.zeros(1, 8, device="cuda")
    with pytest.raises(UnsupportedOptionError, match="float32"):
        add_lora(x, x, a=x[None], b=torch.zeros(1, 8, 1, device="cuda"), indices=torch.zeros(1, device="cuda").int())


@pytest.mark.gpu
def test_bf16_is_refused_where_the_target_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CUDA_TARGET", "compute_75")
    x = torch.zeros(1, 8, device="cuda", dtype=torch.bfloat16)
    b, indices = torch.zeros(1, 8, 1, device="cuda", dtype=torch.bfloat16), torch.zeros(1, device="cuda").int()
    with pytest.raises(UnsupportedOptionError, match=r"x\.dtype=torch\.bfloat16(.|\n)*older than sm_80"):
        add_lora(x, x, a=x[None], b=b, indices=indices)
