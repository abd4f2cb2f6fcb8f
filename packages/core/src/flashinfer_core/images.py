"""The image store: a kernel's machine code with the facts needed to trust and launch it, and how it is found.

Shipped in the package, then the user's cache, then compiled (GPUs only). A shipped image counts only while its
`sources` digest is that of the kernels beside it, so an edited header can never run old code.

Environment variables, read at each call:

    FLASHINFER_CACHE_DIR      folder of the user's cache; without it $XDG_CACHE_HOME/flashinfer-images,
                              ~/.cache/flashinfer-images, flashinfer-images-<uid> in the temporary folder, memory
    FLASHINFER_NO_COMPILE=1   never compile at run time: a kernel neither shipped nor cached raises MissingImageError
    FLASHINFER_VERBOSE=1      tell on stderr which image was chosen and why (logger `flashinfer`, level debug)
    FLASHINFER_CUDA_TARGET    run this target on GPUs instead of the best one: compute_75 on an H100
    FLASHINFER_CPU_TARGET     run this target on the CPU: x86_64_v2
    FLASHINFER_NUM_THREADS    threads of a CPU kernel; without it as many as torch uses, or all the process may use
    FLASHINFER_TARGETS        targets that a build compiles: a comma list of names, `cpu`, `cuda`
    FLASHINFER_BUILD_CACHE    folder where builds keep compiled images; without it ~/.cache/flashinfer-build
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from flashinfer_core import cache, headers, settings
from flashinfer_core.errors import CorruptImageError, InstallationError, MissingImageError
from flashinfer_core.targets import target_named
from flashinfer_core.variant import Variant

FORMAT = 3
_TEXTS = ("name", "expression", "target", "entry", "key", "sources", "compiler")
_COUNTS = ("registers", "spill_bytes", "shared_bytes")
_LOG = logging.getLogger("flashinfer")


@dataclass(frozen=True)
class Image:
    """One compiled kernel. Registers, spills and static shared memory are None where the compiler does not tell."""

    name: str
    expression: str
    target: str
    entry: str
    key: str
    sources: str
    compiler: str
    flags: tuple[str, ...]
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    seconds: float
    payload: bytes

    def to_bytes(self) -> bytes:
        """Write a JSON line that describes the payload, then the payload, deflated: machine code has much that repeats.

        `sha256` is of all else that is written.
        """
        names = (field.name for field in dataclasses.fields(self) if field.name != "payload")
        header = {"flashinfer_image": FORMAT, **{name: getattr(self, name) for name in names}}
        stored = zlib.compress(self.payload, 9)
        return _line({**header, "sha256": _checksum(header, stored)}) + stored

    @staticmethod
    def from_bytes(data: bytes) -> Image:
        """Read what `to_bytes` wrote; raise CorruptImageError where a byte is missing or wrong."""
        line, _, stored = data.partition(b"\n")
        try:
            header = json.loads(line)
            written, checksum = header["flashinfer_image"], header.pop("sha256", None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptImageError(f"not an image file: {error}") from None
        if written != FORMAT:
            raise CorruptImageError(f"image format {written!r}, expected {FORMAT}")
        if checksum != _checksum(header, stored):
            raise CorruptImageError(f"the checksum over header and payload ({len(stored)} bytes) is another")
        del header["flashinfer_image"]
        if set(header) != {field.name for field in dataclasses.fields(Image)} - {"payload"}:
            raise CorruptImageError(f"the header has the fields {', '.join(sorted(header))}")
        _check_types(header)
        try:
            payload = zlib.decompress(stored)
        except zlib.error as error:
            raise CorruptImageError(f"the payload is not deflated: {error}") from None
        return Image(payload=payload, **{**header, "flags": tuple(header["flags"])})


def _line(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True).encode() + b"\n"


def _checksum(header: Mapping[str, Any], payload: bytes) -> str:
    return hashlib.sha256(_line(header) + payload).hexdigest()


def _check_types(header: Mapping[str, Any]) -> None:
    """Raise unless each field is of its type: what was written by other code may have a right checksum."""
    flags = header["flags"]
    wrong = [name for name in _TEXTS if not isinstance(header[name], str)]
    wrong += [name for name in _COUNTS if header[name] is not None and type(header[name]) is not int]
    wrong += ["seconds"] if type(header["seconds"]) not in (int, float) else []
    wrong += [] if isinstance(flags, list) and all(isinstance(flag, str) for flag in flags) else ["flags"]
    if wrong:
        raise CorruptImageError(f"{wrong[0]} of the header is {header[wrong[0]]!r}")


def path_of(images: Path, target: str, name: str) -> Path:
    """Return where an image lies in a package's `images` folder."""
    return images / target / f"{name}.image"


def find_first(offered: Mapping[str, Variant]) -> Image:
    """Return the first image of {target: its variant}, best target first.

    Shipped images of all targets come before cached ones, and those before a compile for the best GPU target.
    Raises MissingImageError that lists what was looked at, CompileError when the source does not compile.
    """
    _speak_up()
    reasons: list[str] = []
    for target, variant in offered.items():
        image = shipped(variant, target, reasons)
        if image:
            _LOG.debug("%s: shipped image for %s", variant.name, target)
            return image
    if target_named(next(iter(offered))).is_cpu:
        raise _missing(offered, reasons)
    return _cached_or_compiled(offered, reasons)


def shipped(variant: Variant, target: str, reasons: list[str]) -> Image | None:
    """Return the image in the variant's package; where there is none, append why to `reasons`."""
    from flashinfer_core import unit

    folder = headers.package_folder(variant.package)
    path = path_of(folder / "images", target, variant.name)
    try:
        image = Image.from_bytes(path.read_bytes())
    except OSError as error:
        reasons.append(f"{path}: {error.strerror}")
        return None
    except CorruptImageError as error:
        _LOG.warning("%s is damaged (%s); reinstall %s", path, error, variant.package.replace("_", "-"))
        reasons.append(f"{path}: damaged")
        return None
    if image.expression != variant.expression or image.sources != unit.sources(variant, target, folder / "kernels"):
        reasons.append(f"{path}: compiled from other sources than {folder / 'kernels'}")
        return None
    return image


def _cached_or_compiled(offered: Mapping[str, Variant], reasons: list[str]) -> Image:
    from flashinfer_core import compiler, nvrtc, unit

    try:
        library = nvrtc.find()
    except InstallationError as error:
        reasons.append(str(error))
        raise _missing(offered, reasons) from None
    target = next((name for name in offered if library.supports(name)), None)
    if target is None:
        reasons.append(f"{library.identity} ({library.path}) compiles for none of {', '.join(offered)}")
        raise _missing(offered, reasons)
    job = unit.describe(offered[target], target, compiler=library.identity)
    image = cache.load(job.key)
    if image:
        _LOG.debug("%s: cached image for %s", job.name, target)
        return image
    if settings.enabled("FLASHINFER_NO_COMPILE"):
        reasons.append("FLASHINFER_NO_COMPILE forbids compiling")
        raise _missing(offered, reasons)
    image = compiler.compile_unit(job, library)
    where = cache.store(image)
    _LOG.warning(
        "compiled %s for %s in %.1f s (kept in %s) because: %s", job.name, target, image.seconds, where, reasons[0]
    )
    return image


def _missing(offered: Mapping[str, Variant], reasons: Sequence[str]) -> MissingImageError:
    target, variant = next(iter(offered.items()))
    looked = "".join(f"\n  {reason}" for reason in reasons)
    remedy = f"pip install --force-reinstall {variant.package.replace('_', '-')}, or from a source tree: "
    remedy += f"python -m flashinfer_core.compiler {variant.package} --target {target}"
    wanted = f"no image of {variant.name} for {' or '.join(offered)}"
    return MissingImageError(f"{wanted}; looked at:{looked}", remedy=remedy)


@functools.lru_cache(maxsize=None)
def _speak_up() -> None:
    """Print debug messages of the logger, once, where FLASHINFER_VERBOSE asks for it."""
    if settings.enabled("FLASHINFER_VERBOSE"):
        _LOG.addHandler(logging.StreamHandler())
        _LOG.setLevel(logging.DEBUG)
