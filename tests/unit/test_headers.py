"""The include closure holds exactly the bytes that an image depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashinfer_core import headers
from flashinfer_core.errors import CompileError, InstallationError


def _tree(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".h")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_closure_follows_includes_once_and_ignores_system_headers(tmp_path: Path) -> None:
    _tree(tmp_path, a='#include "x/b.h"\n#include <cstdint>\n', x__b='  #  include "a.h"\n#include "c.h"\n', c="int c;")
    _tree(tmp_path, unused="int d;")
    assert list(headers.closure(["a.h"], [tmp_path])) == ["a.h", "c.h", "x/b.h"]


def test_the_package_comes_before_core(tmp_path: Path) -> None:
    own = _tree(tmp_path / "own", core__types="mine")
    files = headers.closure(["core/types.h", "core/work.h"], headers.roots(own))
    assert files["core/types.h"] == b"mine"
    assert b"WorkItem" in files["core/work.h"]


def test_missing_include_names_its_includer(tmp_path: Path) -> None:
    _tree(tmp_path, a='#include "gone.h"\n')
    with pytest.raises(CompileError, match=r"no file 'gone.h', included by a.h\nincludes are relative to"):
        headers.closure(["a.h"], [tmp_path])


def test_digest_sees_bytes_names_and_borders() -> None:
    digests = [
        headers.digest(files)
        for files in ({"a": b"12"}, {"a": b"13"}, {"b": b"12"}, {"a": b"1", "b": b"2"}, {"a": b"", "b": b"12"})
    ]
    assert len(set(digests)) == len(digests)


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert headers.package_folder("explosive") == tmp_path / "explosive"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("flashinfer_lora", "pip install -i INDEX flashinfer-lora, where the other flashinfer wheels came from$"),
        ("flashinfer-lora", "pip install -i INDEX flashinfer-lora, .* and name it flashinfer_lora$"),
        ("flashinfer_nothing", "packages of kernels: flashinfer_attention, .*one of your own must be importable"),
    ],
)
def test_absent_package_names_what_pip_can_install(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InstallationError, match=f"'{name}' is not installed\n{remedy}"):
        headers.package_folder(name)
