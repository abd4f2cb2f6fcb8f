"""Structs read from headers have the layout that the C++ compiler gives them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from flashinfer_core import compiler, headers, params
from flashinfer_core.errors import InstallationError, InvalidArgumentError

STRUCTS = {
    "AttentionParams": ("flashinfer_attention", "attention/params.h", "flashinfer::attention::"),
    "MergeParams": ("flashinfer_attention", "attention/params.h", "flashinfer::attention::"),
    "AppendParams": ("flashinfer_page", "page/params.h", "flashinfer::page::"),
    "WorkItem": ("flashinfer_core", "core/work.h", "flashinfer::"),
}


@pytest.mark.parametrize("name", STRUCTS)
def test_offsets_are_those_of_the_compiler(name: str, tmp_path: Path) -> None:
    package, header, namespace = STRUCTS[name]
    struct = params.structure(package, header, name)
    fields = [field[0] for field in struct._fields_]
    lines = "".join(f'  std::printf("%zu\\n", offsetof(T, {field}));\n' for field in fields)
    (tmp_path / "offsets.cpp").write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{header}"\n'
        f"using T = {namespace}{name};\nint main() {{\n{lines}}}\n"
    )
    roots = headers.roots(headers.package_folder(package) / "kernels")
    command = [*compiler.cxx().split(), "-std=c++17", *(f"-I{root}" for root in roots), "offsets.cpp", "-o", "offsets"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([str(tmp_path / "offsets")], capture_output=True, text=True, check=True).stdout
    assert [getattr(struct, field).offset for field in fields] == [int(line) for line in printed.split()]


def _parse(text: str, name: str = "P") -> type[ctypes.Structure]:
    return params.parse({"p.h": text.encode()}, name)


def test_nested_pointers_arrays_defaults_and_comments() -> None:
    struct = _parse("""
        struct In { int32_t a; /* int32_t b; */ float c; };
        static_assert(sizeof(In) == 8, "");
        struct P {
          const In* pointer;   // a; b
          ns::In in;
          int8_t bytes[3];
          int64_t x = -1;
        };
        static_assert(sizeof(P) == 32, "");""")
    assert [field[0] for field in struct._fields_] == ["pointer", "in", "bytes", "x"]
    value = struct(pointer=1 << 40, x=-5)
    getattr(value, "in").c = 0.5
    assert (value.pointer, getattr(value, "in").c, value.x) == (1 << 40, 0.5, -5)


@pytest.mark.parametrize("assertion", ["", 'static_assert(sizeof(P) == 12, "");'], ids=["absent", "wrong"])
def test_size_must_be_asserted(assertion: str) -> None:
    with pytest.raises(InstallationError, match="struct P is 4 bytes here"):
        _parse("struct P { int32_t a; };" + assertion)


@pytest.mark.parametrize(
    "field", ["int32_t a, b", "int32_t a[kN]", "void (*call)(int)"], ids=["two", "named length", "function"]
)
def test_unreadable_field_is_quoted(field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"cannot read the field .* of struct P"):
        _parse(f"struct P {{ {field}; }};")


def test_unknown_struct_lists_the_known() -> None:
    with pytest.raises(InvalidArgumentError, match="no plain struct Q\nknown here: P"):
        _parse("struct P { int32_t a; };", "Q")
