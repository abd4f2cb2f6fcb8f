"""The static index: what is read off a wheel, what a page says, and that adding never breaks what is there."""

from __future__ import annotations

import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Dict, List, Optional, Tuple
from urllib.parse import unquote

import pytest
from packaging.utils import canonicalize_name

from wheel_files import write_wheel
from wheelindex import pages, tree
from wheelindex.__main__ import main
from wheelindex.errors import BadWheelError, ConflictError
from wheelindex.wheels import read

CPU, CUDA = "0.1.0+cputorch2.13", "0.1.0+cu130torch2.11"


class Links(HTMLParser):
    """Collects the attributes of every link, as an installer does."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: List[Dict[str, Optional[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        if tag == "a":
            self.found.append(dict(attrs))


def snapshot(root: Path) -> Dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_read_says_what_an_index_needs(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "Flashinfer_Core", CPU)
    wheel = read(path)
    assert wheel.project == "flashinfer-core"
    assert str(wheel.version) == CPU
    assert wheel.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert wheel.requires_python == ">=3.8"
    assert wheel.directory.as_posix() == "cpu/torch2.13"


def test_directory_comes_from_the_local_version(tmp_path: Path) -> None:
    assert read(write_wheel(tmp_path, "a", CUDA)).directory.as_posix() == "cu130/torch2.11"


@pytest.mark.parametrize("version", ["0.1.0", "0.1.0+cu130", "0.1.0+rocm6torch2.5"])
def test_unstamped_wheels_have_no_directory(tmp_path: Path, version: str) -> None:
    with pytest.raises(BadWheelError, match="local part"):
        _ = read(write_wheel(tmp_path, "a", version)).directory


def test_file_name_and_metadata_must_agree(tmp_path: Path) -> None:
    renamed = write_wheel(tmp_path, "a", CPU).rename(tmp_path / "b-0.1.0+cputorch2.13-py3-none-any.whl")
    with pytest.raises(BadWheelError, match="its metadata says a"):
        read(renamed)


@pytest.mark.parametrize("name", ["a-0.1.0+cputorch2.13-py3-none-any.whl", "a.whl"])
def test_rubbish_is_refused(tmp_path: Path, name: str) -> None:
    rubbish = tmp_path / name
    rubbish.write_bytes(b"not a zip file")
    with pytest.raises(BadWheelError, match=re.escape(name)):
        read(rubbish)


def test_malformed_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWheelError, match="newest"):
        read(write_wheel(tmp_path, "a", CPU, requires_python="newest"))


def test_project_page_links_with_hash_and_python(tmp_path: Path) -> None:
    wheel = read(write_wheel(tmp_path, "a", CPU))
    (link,) = Links(pages.project_page(wheel.project, [wheel])).found
    href, _, fragment = (link["href"] or "").partition("#")
    assert "+" not in href, "a bare plus is read as a space by some servers"
    assert unquote(href) == wheel.filename
    assert fragment == f"sha256={wheel.sha256}"
    assert link["data-requires-python"] == ">=3.8"


def test_project_page_omits_an_unstated_python(tmp_path: Path) -> None:
    wheel = read(write_wheel(tmp_path, "a", CPU, requires_python=""))
    assert "data-requires-python" not in Links(pages.project_page(wheel.project, [wheel])).found[0]


def test_project_page_orders_by_version(tmp_path: Path) -> None:
    wheels = [read(write_wheel(tmp_path, "a", f"0.{minor}.0+cputorch2.13")) for minor in (10, 9, 2)]
    links = Links(pages.project_page(canonicalize_name("a"), wheels)).found
    assert [(link["href"] or "").split("%2B")[0] for link in links] == ["a-0.2.0", "a-0.9.0", "a-0.10.0"]


def test_root_page_lists_each_project_once() -> None:
    names = [canonicalize_name(name) for name in ("b", "a", "b")]
    assert [link["href"] for link in Links(pages.root_page(names)).found] == ["a/", "b/"]


def test_add_lays_wheels_out_by_platform_and_torch(tmp_path: Path) -> None:
    built = [write_wheel(tmp_path / "in", "a", CPU), write_wheel(tmp_path / "in", "a", CUDA)]
    touched = tree.add(tmp_path / "index", built)
    assert [path.relative_to(tmp_path / "index").as_posix() for path in touched] == ["cpu/torch2.13", "cu130/torch2.11"]
    assert sorted(snapshot(tmp_path / "index")) == [
        "cpu/torch2.13/a/a-0.1.0+cputorch2.13-py3-none-any.whl",
        "cpu/torch2.13/a/index.html",
        "cpu/torch2.13/index.html",
        "cu130/torch2.11/a/a-0.1.0+cu130torch2.11-py3-none-any.whl",
        "cu130/torch2.11/a/index.html",
        "cu130/torch2.11/index.html",
    ]


def test_add_keeps_what_is_there(tmp_path: Path) -> None:
    index = tmp_path / "index"
    tree.add(index, [write_wheel(tmp_path, "a", CPU), write_wheel(tmp_path, "b", CPU)])
    tree.add(index, [write_wheel(tmp_path, "a", "0.2.0+cputorch2.13")])
    assert len(Links((index / "cpu/torch2.13/a/index.html").read_text()).found) == 2
    assert len(Links((index / "cpu/torch2.13/index.html").read_text()).found) == 2


def test_same_wheels_give_the_same_bytes(tmp_path: Path) -> None:
    built = [write_wheel(tmp_path, name, CPU) for name in ("a", "b")]
    tree.add(tmp_path / "one", built)
    for wheel in reversed(built):
        tree.add(tmp_path / "two", [wheel])
    tree.add(tmp_path / "two", built)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_other_bytes_under_a_known_name_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "index"
    tree.add(index, [write_wheel(tmp_path / "1", "a", CPU)])
    before = snapshot(index)
    with pytest.raises(ConflictError, match="other bytes"):
        tree.add(index, [write_wheel(tmp_path / "2", "b", CPU), write_wheel(tmp_path / "2", "a", CPU, content="1")])
    assert snapshot(index) == before, "nothing is written when one wheel is refused"


def test_a_write_that_fails_leaves_the_index_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    tree.add(index, [write_wheel(tmp_path, "a", CPU)])
    before = snapshot(index)

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        tree.add(index, [write_wheel(tmp_path, "b", CPU)])
    assert snapshot(index) == before


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "index"), str(write_wheel(tmp_path, "a", CPU))]) == 0
    assert f"-i file://{tmp_path}/index/cpu/torch2.13/" in capsys.readouterr().out
    assert main([str(tmp_path / "index"), str(write_wheel(tmp_path, "a", "0.1.0"))]) == 1
    assert "local part" in capsys.readouterr().err
