"""A translation unit as a value: everything that goes into a compiler, so also everything that its key hashes.

Both kinds of source become text that includes the kernel and names one instance of it; headers travel as bytes, so
what was hashed is what is compiled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from flashinfer_core import headers
from flashinfer_core.targets import target_named
from flashinfer_core.variant import Variant

CPU_ENTRY = "flashinfer_entry"
_CPU_ENTRY_HEADER = "core/cpu_entry.h"

GPU_FLAGS = ("-std=c++17",)
CPU_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    # None of these changes a result that the kernels define: they do not read errno or floating-point traps, and
    # fused multiply-add is what GPUs do too.
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    # libc and libm only, so that one image serves every distribution.
    "-static-libgcc", "-Wl,--as-needed", "-Wl,--build-id=none", "-s",
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What a compiler is given. `headers` maps include names to bytes; `compiler` names the program and version."""

    name: str
    expression: str
    target: str
    text: str
    headers: dict[str, bytes]
    flags: tuple[str, ...]
    compiler: str

    @property
    def sources(self) -> str:
        """Hash the include closure."""
        return headers.digest(self.headers)

    @property
    def key(self) -> str:
        """Hash all that the machine code depends on."""
        parts = (self.sources, self.text, self.expression, self.target, self.flags, self.compiler)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def describe(variant: Variant, target: str, *, compiler: str, kernels: Path | None = None) -> Unit:
    """Return the unit of `variant` for `target`; `kernels` replaces the folder of the variant's package."""
    facts = target_named(target)
    folder = kernels or headers.package_folder(variant.package) / "kernels"
    files = headers.closure(_includes(variant, target), headers.roots(folder))
    text = "".join(f'#include "{name}"\n' for name in _includes(variant, target))
    flags: tuple[str, ...] = GPU_FLAGS
    if facts.is_cpu:
        flags = (*CPU_FLAGS, f"-march={facts.march}", *(f"-m{extension}" for extension in facts.extensions))
        text += _cpu_entry(variant.expression)
    return Unit(variant.name, variant.expression, target, text, files, flags, compiler)


def sources(variant: Variant, target: str, kernels: Path) -> str:
    """Hash the include closure of `variant` as it is on disk now."""
    return headers.digest(headers.closure(_includes(variant, target), headers.roots(kernels)))


def _includes(variant: Variant, target: str) -> Sequence[str]:
    return (variant.source, _CPU_ENTRY_HEADER) if target_named(target).is_cpu else (variant.source,)


def _cpu_entry(expression: str) -> str:
    return (
        f'extern "C" void {CPU_ENTRY}(const void* params, int32_t worker, int32_t num_workers) {{\n'
        f"  flashinfer::enter<&{expression}>(params, worker, num_workers);\n"
        f"}}\n"
    )
