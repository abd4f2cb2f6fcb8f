"""What works where, as one table: the checks before a launch, `why_not`, and docs/support.md all read it.

Nothing here asks a GPU, so the answer for any target can be had on any machine.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

import torch

from flashinfer_attention.variants import SUPPORT, Support
from flashinfer_core.errors import InvalidTypeError, UnsupportedOptionError
from flashinfer_core.targets import TARGETS, target_named

ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
FP8_ELEMENTS = {
    getattr(torch, name): element
    for name, element in (("float8_e4m3fn", "e4m3"), ("float8_e5m2", "e5m2"))
    if hasattr(torch, name)
}
KV_ELEMENTS = {**ELEMENTS, **FP8_ELEMENTS}

# What a call may ask for beyond plain attention, and how the documentation describes it.
OPTIONS = {
    "window_left": "sliding window",
    "mask": "custom mask, as booleans or bits",
    "logits_soft_cap": "soft cap of the logits",
    "alibi": "ALiBi",
    "rope": "RoPE on the fly",
    "sinks": "attention sinks",
    "v_scale": "scale of v",
    "scale_tensors": "scales of q, k and v as tensors, those of k and v also per KV head",
    "head_dim_vo": "values narrower or wider than keys",
    "fp8": "keys and values in fp8",
    "deterministic": "results that do not depend on the batch, to the bit",
}

_INTRODUCTION = (
    "# What works where",
    "",
    "Made by `flashinfer_attention.support.table()`, from what the library itself refuses by. For a whole problem",
    "`flashinfer_attention.why_not` answers, on any machine. Options combine freely.",
    "",
)


class Asked(NamedTuple):
    """What a problem asks of the kernels of one kind of device."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    head_dim_vo: int
    options: Sequence[str] = ()
    has_bfloat16: bool = True


def refusals(kind: str, asked: Asked) -> Iterator[UnsupportedOptionError]:
    """Yield an error for everything that the kernels of `kind` (cpu, cuda) lack; none where all is there."""
    support = SUPPORT[kind]
    yield from _dtype(support, asked)
    yield from _head_dims(support, asked)
    for option in asked.options:
        if option not in support.options:
            yield UnsupportedOptionError(option, True, f"not on {support.where} yet")


def _dtype(support: Support, asked: Asked) -> Iterator[UnsupportedOptionError]:
    known = [dtype for dtype, element in ELEMENTS.items() if element in support.dtypes]
    names = ", ".join(map(_bare, known))
    if asked.dtype not in known:
        yield UnsupportedOptionError("dtype", asked.dtype, f"{names} on {support.where}")
    elif asked.dtype == torch.bfloat16 and not asked.has_bfloat16:
        yield UnsupportedOptionError("dtype", asked.dtype, "float16 on GPUs older than sm_80, which lack bfloat16")
    if asked.kv_dtype != asked.dtype and not (asked.kv_dtype in FP8_ELEMENTS and "fp8" in support.options):
        fp8 = ", float8_e4m3fn and float8_e5m2" if "fp8" in support.options else ""
        yield UnsupportedOptionError("kv_dtype", asked.kv_dtype, f"that of q, {asked.dtype}{fp8}, on {support.where}")


def _head_dims(support: Support, asked: Asked) -> Iterator[UnsupportedOptionError]:
    dims = {"head_dim": asked.head_dim}
    if asked.head_dim_vo != asked.head_dim:
        dims["head_dim_vo"] = asked.head_dim_vo
    for name, dim in dims.items():
        if dim not in support.head_dims:
            nearest = min(support.head_dims, key=lambda known: abs(known - dim))
            yield UnsupportedOptionError(
                name, dim, f"{_spelled(support.head_dims)} on {support.where}; the nearest is {nearest}"
            )
    if len(dims) > 1 and "head_dim_vo" not in support.options:
        yield UnsupportedOptionError(
            "head_dim_vo", asked.head_dim_vo, f"head_dim, {asked.head_dim}, on {support.where}"
        )


def _spelled(dims: Sequence[int]) -> str:
    if len(dims) > 1 and tuple(dims) == tuple(range(dims[0], dims[-1] + 1, dims[0])):
        return f"multiples of {dims[0]} up to {dims[-1]}"
    return ", ".join(map(str, dims))


def why_not(
    target: str,
    *,
    dtype: Union[torch.dtype, str] = torch.float16,
    kv_dtype: Optional[Union[torch.dtype, str]] = None,
    head_dim: int = 128,
    head_dim_vo: Optional[int] = None,
    options: Sequence[str] = (),
) -> List[str]:
    """Say what `target` lacks for a problem, a sentence for each; an empty list means that it runs.

    target: an architecture, as sm_90 or x86_64_v3. dtype, kv_dtype: a dtype or its name; None: that of q.
    head_dim_vo: None: head_dim. options: names in `OPTIONS` that are wanted at once. Asks no GPU.
    Raises InvalidArgumentError for an unknown target, InvalidTypeError for what is no dtype or option.
    """
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise InvalidTypeError(f"unknown option {unknown[0]!r}", remedy=f"known options: {', '.join(OPTIONS)}")
    q_dtype = dtype_of("dtype", dtype)
    asked = Asked(
        q_dtype,
        q_dtype if kv_dtype is None else dtype_of("kv_dtype", kv_dtype),
        head_dim,
        head_dim if head_dim_vo is None else head_dim_vo,
        options,
        has_bfloat16=not target.endswith("_75"),
    )
    return [str(refusal) for refusal in refusals("cpu" if target_named(target).is_cpu else "cuda", asked)]


def supports(
    target: str,
    *,
    dtype: Union[torch.dtype, str] = torch.float16,
    kv_dtype: Optional[Union[torch.dtype, str]] = None,
    head_dim: int = 128,
    head_dim_vo: Optional[int] = None,
    options: Sequence[str] = (),
) -> bool:
    """Say whether `target` runs a problem; arguments and errors as `why_not`."""
    return not why_not(
        target, dtype=dtype, kv_dtype=kv_dtype, head_dim=head_dim, head_dim_vo=head_dim_vo, options=options
    )


def dtype_of(name: str, value: Union[str, torch.dtype]) -> torch.dtype:
    """Return the dtype that `value` is or names."""
    dtype: Optional[object] = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise InvalidTypeError(f"{name} must be a torch.dtype or its name, as 'float16', got {value!r}")
    return dtype


def table() -> str:
    """Return the text of docs/support.md: what works on each target."""
    targets = {name: "cpu" if target.is_cpu else "cuda" for name, target in TARGETS.items() if target.kind != "ptx"}
    questions: Dict[str, Dict[str, Any]] = {f"q and o in {_bare(dtype)}": {"dtype": dtype} for dtype in ELEMENTS}
    questions.update({text: _asking(option) for option, text in OPTIONS.items()})
    rows = [
        [text, *("yes" if supports(target, **question) else "no" for target in targets)]
        for text, question in questions.items()
    ]
    rows.append(["head_dim", *(_spelled(SUPPORT[kind].head_dims) for kind in targets.values())])
    lines = ["| " + " | ".join(row) + " |" for row in [["", *targets], ["---"] * (len(targets) + 1), *rows]]
    return "\n".join([*_INTRODUCTION, *lines, ""])


def _asking(option: str) -> Dict[str, Any]:
    if option == "fp8":
        return {"kv_dtype": next(iter(FP8_ELEMENTS))}
    return {"head_dim_vo": 64} if option == "head_dim_vo" else {"options": (option,)}


def _bare(dtype: torch.dtype) -> str:
    return str(dtype)[len("torch.") :]
