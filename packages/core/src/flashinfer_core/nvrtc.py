"""NVRTC, NVIDIA's run-time compiler: where it is, and a binding of the few calls that are needed.

A candidate's version is read off the `libnvrtc-builtins.so.X.Y` beside it, so nothing is loaded to reject it. The
builtins are loaded first: NVRTC asks the loader for them by bare name, which finds only what is loaded already.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence, Tuple

from flashinfer_core.errors import CompileError, InstallationError

Version = Tuple[int, int]

_LIBRARY = re.compile(r"^libnvrtc(-[0-9a-f]+)?\.so(\.[0-9.]+)?$")
_BUILTINS = re.compile(r"^libnvrtc-builtins(?:-[0-9a-f]+)?\.so\.([0-9]+)\.([0-9]+)")
_LOADER_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so")
_OUT_OF_DATE = "nvidia-cuda-nvrtc==13.0.88 (CUDA 13) or nvidia-cuda-nvrtc-cu12==12.6.77 (CUDA 12)"


@dataclass(frozen=True)
class Candidate:
    """One library that may be NVRTC. `version` is None where only loading it tells."""

    path: str
    origin: str
    version: Version | None = None


@dataclass(frozen=True)
class Program:
    """What a compile gives: machine code or PTX, the kernel's mangled name, and the compiler's log."""

    payload: bytes
    entry: str
    log: str


class Nvrtc:
    """A loaded NVRTC. Its methods may be called from several threads at once."""

    def __init__(self, candidate: Candidate) -> None:
        self.path = candidate.path
        self.origin = candidate.origin
        for builtins in _builtins_beside(Path(candidate.path)):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(candidate.path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version: Version = (major.value, minor.value)

    @property
    def identity(self) -> str:
        """Name the compiler as image headers and keys do."""
        return f"NVRTC {self.version_text}"

    def supports(self, target: str) -> bool:
        """Say whether this version compiles for `target`; sm_90a needs 12.0."""
        if target == "sm_90a" and self.version < (12, 0):
            return False
        number = int(re.sub(r"\D", "", target))
        return number in self._architectures()

    def compile(
        self, text: str, expression: str, target: str, headers: Mapping[str, bytes], options: Sequence[str]
    ) -> Program:
        """Compile `text` with in-memory `headers` for `target` and return the instance that `expression` names.

        Raises CompileError whose `log` is NVRTC's, and which quotes the first offending line.
        """
        names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
        contents = (ctypes.c_char_p * len(headers))(*headers.values())
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program), text.encode(), b"kernel.cu", ctypes.c_int(len(headers)), contents, names,
        )  # fmt: skip
        try:
            self._call("nvrtcAddNameExpression", program, expression.encode())
            arguments = [f"--gpu-architecture={target}", *options]
            array = (ctypes.c_char_p * len(arguments))(*[argument.encode() for argument in arguments])
            status = self._library.nvrtcCompileProgram(program, ctypes.c_int(len(arguments)), array)
            log = self._bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if status:
                raise compile_failure(expression, target, self.identity, log, headers)
            entry = ctypes.c_char_p()
            self._call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(entry))
            payload = self._bytes("PTX" if target.startswith("compute_") else "CUBIN", program)
            return Program(payload, (entry.value or b"").decode(), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    @property
    def version_text(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"

    @functools.lru_cache(maxsize=None)  # noqa: B019 - one object per library of the process
    def _architectures(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(numbers)

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = self._library.nvrtcGetErrorString(status).decode()
            raise CompileError(f"{name} of {self.path} failed: {text}", remedy=f"install {_OUT_OF_DATE}")


def compile_failure(
    expression: str, target: str, compiler: str, log: str, headers: Mapping[str, bytes]
) -> CompileError:
    """Make the error for a `log` in which the first `file(line): error` or `file:line:column: error` is quoted."""
    quote = ""
    for match in re.finditer(r"^(\S+?)[(:](\d+)[):].*?\berror\b", log, re.MULTILINE):
        for name, content in headers.items():
            lines = content.decode(errors="replace").splitlines()
            if match[1].endswith(name) and int(match[2]) <= len(lines):
                quote = f"the offending line, {name}:{match[2]}:\n    {lines[int(match[2]) - 1].strip()}"
                return CompileError(f"{compiler} does not compile {expression} for {target}", log=log, remedy=quote)
    return CompileError(f"{compiler} does not compile {expression} for {target}", log=log)


def find(version: str | None = None) -> Nvrtc:
    """Load the first NVRTC of the search order; with `version` ("13.0"), the first of that version.

    Raises InstallationError that lists every candidate and why it was rejected.
    """
    return _find(version)


@functools.lru_cache(maxsize=None)
def _find(version: str | None) -> Nvrtc:
    wanted = parse_version(version) if version else None
    rejected: list[str] = []
    for candidate in candidates():
        if wanted and candidate.version and candidate.version != wanted:
            rejected.append(f"{candidate.path} ({candidate.origin}): is version {_text(candidate.version)}")
            continue
        try:
            nvrtc = Nvrtc(candidate)
        except (OSError, AttributeError, CompileError) as error:
            rejected.append(f"{candidate.path} ({candidate.origin}): {error}")
            continue
        if wanted and nvrtc.version != wanted:
            rejected.append(f"{candidate.path} ({candidate.origin}): is version {nvrtc.version_text}")
            continue
        return nvrtc
    asked = f"NVRTC {version}" if version else "NVRTC"
    looked = "\n".join(f"  {line}" for line in rejected) or "  no candidate at all"
    raise InstallationError(f"no {asked} was found; looked at:\n{looked}", remedy=f"pip install {_package(wanted)}")


def parse_version(text: str) -> Version:
    """Read "13.0" or "13.0.88" as (13, 0)."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def candidates() -> Iterator[Candidate]:
    """Yield every NVRTC there may be: in the process, of torch's packages, of CUDA_HOME, of the loader's path."""
    seen: dict[str, bool] = {}
    searches: tuple[tuple[str, Callable[[], Iterator[Path]]], ...] = (
        ("loaded in this process", _loaded),
        ("Python package", _packaged),
        ("CUDA_HOME", _toolkit),
    )
    for origin, search in searches:
        for path in search():
            real = os.path.realpath(path)
            if real not in seen:
                seen[real] = True
                yield Candidate(str(path), origin, _version_beside(path))
    for name in _LOADER_NAMES:
        yield Candidate(name, "loader path")


def _loaded() -> Iterator[Path]:
    try:
        with open("/proc/self/maps") as maps:
            paths = [line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "libnvrtc" in line]
    except OSError:
        return
    yield from (path for path in map(Path, dict.fromkeys(paths)) if _LIBRARY.match(path.name))


def _packaged() -> Iterator[Path]:
    found: list[Path] = []
    for entry in dict.fromkeys(sys.path):
        folder = Path(entry or ".")
        for pattern in ("nvidia/cuda_nvrtc/lib", "nvidia/cu[0-9]*/lib", "torch/lib"):
            found += [path for lib in sorted(folder.glob(pattern)) for path in _libraries(lib)]
    # Several CUDA majors may be installed; the driver is at least as new as what torch was built for.
    major = (_torch_cuda() or "").split(".")[0]
    yield from sorted(found, key=lambda path: str((_version_beside(path) or ("",))[0]) != major)


def _toolkit() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            for lib in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
                yield from _libraries(Path(os.environ[variable]) / lib)


def _libraries(folder: Path) -> list[Path]:
    # Shortest name first: the soname's link rather than what it points to.
    found = (path for path in folder.glob("libnvrtc*.so*") if _LIBRARY.match(path.name))
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _builtins_beside(library: Path) -> list[Path]:
    return sorted(path for path in library.parent.glob("libnvrtc-builtins*.so.*") if _BUILTINS.match(path.name))


def _version_beside(library: Path) -> Version | None:
    versions = {
        tuple(map(int, match.groups())) for p in _builtins_beside(library) if (match := _BUILTINS.match(p.name))
    }
    if len(versions) != 1:
        return None  # several versions share the folder: only the library itself knows
    major, minor = versions.pop()
    return major, minor


def _torch_cuda() -> str | None:
    from flashinfer_core.matrix import torch_build

    build = torch_build()
    return build.cuda if build else None


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _package(wanted: Version | None) -> str:
    if wanted is None:
        return _OUT_OF_DATE
    if wanted[0] >= 13:
        return f"'nvidia-cuda-nvrtc=={_text(wanted)}.*'"
    return f"'nvidia-cuda-nvrtc-cu{wanted[0]}=={_text(wanted)}.*'"
