"""Parameter structs as ctypes, read from the very header that kernels are compiled with.

So host and device cannot disagree: there is no second description, and the header's static_assert is checked.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any, Mapping

from flashinfer_core import headers
from flashinfer_core.errors import InstallationError, InvalidArgumentError

_SCALARS: Mapping[str, Any] = {
    "int8_t": ctypes.c_int8, "uint8_t": ctypes.c_uint8, "int16_t": ctypes.c_int16, "uint16_t": ctypes.c_uint16,
    "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float, "double": ctypes.c_double, "bool": ctypes.c_bool,
}  # fmt: skip

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(r"\bstruct\s+(\w+)\s*\{(.*?)\}\s*;", re.DOTALL)
_FIELD = re.compile(r"^(?:const\s+)?([\w:]+)(\s*\*\s*(?:const\s+)?|\s+)(\w+)(?:\[(\d+)\])?(?:\s*=\s*[^=]+)?$")
_SIZE = re.compile(r"static_assert\s*\(\s*sizeof\s*\(\s*(\w+)\s*\)\s*==\s*(\d+)")


@functools.lru_cache(maxsize=None)
def structure(package: str, header: str, name: str) -> type[ctypes.Structure]:
    """Return the struct `name` of `header` (below the package's `kernels/`) as a ctypes.Structure.

    Pointers are c_void_p: assign integers. Nested structs, also of included headers, become nested structures.
    Raises InvalidArgumentError for a struct that is absent, InstallationError for one whose size is not as asserted.
    """
    folder = headers.package_folder(package) / "kernels"
    return parse(headers.closure([header], headers.roots(folder)), name)


def parse(files: Mapping[str, bytes], name: str) -> type[ctypes.Structure]:
    """Return the struct `name` declared in any of `files`."""
    text = _COMMENT.sub("", "\n".join(content.decode() for content in files.values()))
    bodies = {match[1]: match[2] for match in _STRUCT.finditer(text)}
    sizes = {match[1]: int(match[2]) for match in _SIZE.finditer(text)}
    return _build(name, bodies, sizes, {})


def _build(
    name: str, bodies: Mapping[str, str], sizes: Mapping[str, int], done: dict[str, type[ctypes.Structure]]
) -> type[ctypes.Structure]:
    if name in done:
        return done[name]
    if name not in bodies:
        raise InvalidArgumentError(f"no plain struct {name}", remedy=f"known here: {', '.join(sorted(bodies))}")
    fields: list[tuple[str, Any]] = []
    for declaration in bodies[name].split(";"):
        if declaration.strip():
            fields.append(_field(name, declaration.strip(), bodies, sizes, done))
    result = type(name, (ctypes.Structure,), {"_fields_": fields})
    if sizes.get(name) != ctypes.sizeof(result):
        raise InstallationError(
            f"struct {name} is {ctypes.sizeof(result)} bytes here, and its header asserts {sizes.get(name)}",
            remedy=f"give the header a `static_assert(sizeof({name}) == ...)` that holds, or reinstall the package",
        )
    done[name] = result
    return result


def _field(
    struct: str,
    declaration: str,
    bodies: Mapping[str, str],
    sizes: Mapping[str, int],
    done: dict[str, type[ctypes.Structure]],
) -> tuple[str, Any]:
    match = _FIELD.match(declaration)
    if not match:
        raise InvalidArgumentError(
            f"cannot read the field {declaration!r} of struct {struct}",
            remedy="declare one field a line: a fixed-width scalar, a pointer, a struct, or an array of literal length",
        )
    kind: Any
    if "*" in match[2]:
        kind = ctypes.c_void_p
    elif match[1] in _SCALARS:
        kind = _SCALARS[match[1]]
    else:
        kind = _build(match[1].split("::")[-1], bodies, sizes, done)
    return match[3], kind * int(match[4]) if match[4] else kind
