"""Compile variants to images: the one function for wheels and for run time, and the loop that builds a package.

    python -m flashinfer_core.compiler flashinfer_attention --target sm_90,x86_64_v3

Needs neither torch nor the host extension, so a build hook can import it from the source tree.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Mapping, Sequence

from flashinfer_core import nvrtc as nvrtc_module
from flashinfer_core import unit as unit_module
from flashinfer_core.errors import CompileError, UnsupportedDeviceError
from flashinfer_core.images import Image
from flashinfer_core.nvrtc import Nvrtc, compile_failure
from flashinfer_core.targets import target_named
from flashinfer_core.unit import CPU_ENTRY, Unit
from flashinfer_core.variant import Variant


def compile_image(variant: Variant, target: str, *, nvrtc: str | None = None, kernels: Path | None = None) -> Image:
    """Compile `variant` for `target`: with NVRTC (of version `nvrtc`, "13.0") for GPUs, $CXX or g++ for CPUs.

    `kernels` replaces the folder of the variant's package. Raises CompileError with the compiler's log.
    """
    job, library = prepare(variant, target, nvrtc=nvrtc, kernels=kernels)
    return compile_unit(job, library)


def prepare(
    variant: Variant, target: str, *, nvrtc: str | None = None, kernels: Path | None = None
) -> tuple[Unit, Nvrtc | None]:
    """Return the unit that `compile_image` compiles, and the NVRTC it needs (None for CPUs)."""
    if target_named(target).is_cpu:
        return unit_module.describe(variant, target, compiler=cxx_identity(cxx()), kernels=kernels), None
    library = nvrtc_module.find(nvrtc)
    if not library.supports(target):
        raise UnsupportedDeviceError(
            f"NVRTC {library.version_text} ({library.path}) cannot compile for {target}",
            remedy="leave the target out, or use a newer NVRTC: sm_90a needs 12.0",
        )
    return unit_module.describe(variant, target, compiler=library.identity, kernels=kernels), library


def compile_unit(unit: Unit, library: Nvrtc | None) -> Image:
    """Compile what `prepare` described."""
    began = time.perf_counter()
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    if library is None:
        payload, entry = _compile_cpu(unit), CPU_ENTRY
    else:
        # -v changes the log only, so it is not among the flags that the key hashes.
        program = library.compile(
            unit.text, unit.expression, unit.target, unit.headers, (*unit.flags, "--ptxas-options=-v")
        )
        payload, entry = program.payload, program.entry
        registers, spills, shared = resources(program.log, entry)
    return Image(
        name=unit.name, expression=unit.expression, target=unit.target, entry=entry, key=unit.key,
        sources=unit.sources, compiler=unit.compiler, flags=unit.flags, registers=registers, spill_bytes=spills,
        shared_bytes=shared, seconds=round(time.perf_counter() - began, 3), payload=payload,
    )  # fmt: skip


def resources(log: str, entry: str) -> tuple[int | None, int | None, int | None]:
    """Read registers, spilled bytes (stores and loads) and static shared bytes of `entry` off ptxas' -v log."""
    _, found, section = log.partition(f"Compiling entry function '{entry}'")
    if not found:
        return None, None, None
    section = section.split("Compiling entry function")[0]
    registers = re.search(r"Used (\d+) registers", section)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section)
    shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", section)
    return (
        int(registers[1]) if registers else None,
        int(spills[1]) + int(spills[2]) if spills else None,
        int(shared[1]) if shared else 0,
    )


def cxx() -> str:
    """Return the C++ compiler's command: $CXX, may hold arguments, or g++."""
    return os.environ.get("CXX") or "g++"


@functools.lru_cache(maxsize=None)
def cxx_identity(command: str) -> str:
    """Return the first line that `command --version` prints; raise CompileError where it cannot run."""
    try:
        done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(
            f"the C++ compiler {command!r} does not run: {error}",
            remedy="install g++ 11 or newer, or set CXX: pip install ziglang; CXX='python -m ziglang c++'",
        ) from None
    return (done.stdout.splitlines() or [command])[0]


def zig_flags(flags: Sequence[str]) -> list[str]:
    """Spell the flags of GCC and Clang for zig, which takes a processor and its extensions as one name."""
    march = next(flag.partition("=")[2] for flag in flags if flag.startswith("-march="))
    processor = "generic" if march == "armv8-a" else march.replace("-", "_")
    extensions = [flag[2:].replace("-", "_") for flag in flags if flag.startswith("-m") and "=" not in flag]
    return [*(flag for flag in flags if not flag.startswith("-m")), f"-mcpu={'+'.join([processor, *extensions])}"]


def _compile_cpu(unit: Unit) -> bytes:
    command = cxx()
    with tempfile.TemporaryDirectory(prefix="flashinfer-") as folder:
        # Relative paths only: the object must not depend on the temporary folder's name.
        _write_tree(Path(folder), {**unit.headers, "unit.cpp": unit.text.encode()})
        flags = zig_flags(unit.flags) if "zig" in command else unit.flags
        arguments = [*shlex.split(command), *flags, "-I.", "unit.cpp", "-o", "unit.so", "-lm"]
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise compile_failure(unit.expression, unit.target, unit.compiler, done.stderr, unit.headers)
        return (Path(folder) / "unit.so").read_bytes()


def _write_tree(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    import sys

    from flashinfer_core.build import main

    sys.exit(main())
