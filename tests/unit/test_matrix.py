"""The support matrix is data, and the installed torch is known without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashinfer_core import matrix
from flashinfer_core.errors import InstallationError
from flashinfer_core.matrix import TorchBuild

VERSION_PY = """
__version__ = '{version}'
debug = False
cuda{annotation} = {cuda}
"""


def test_rows_join_torch_with_its_pythons() -> None:
    [cpu, row] = matrix.parse(
        {
            "torch": {"2.5": {"python": ["3.9", "3.12"]}, "2.4": {"python": ["3.8"]}},
            "row": [
                {"cuda": "cpu", "torch": ["2.5"]},
                {"cuda": "12.4", "nvrtc": "n==12.4.127", "torch": ["2.4", "2.5"]},
            ],
        }
    )
    assert dict(row.torch) == {"2.4": ("3.8",), "2.5": ("3.9", "3.12")}
    assert row.nvrtc == "n==12.4.127"
    assert row.folder("2.5") == "cu124/torch2.5"
    assert cpu.folder("2.5") == "cpu/torch2.5"


def test_the_matrix_of_this_installation_is_whole() -> None:
    rows = {row.cuda: row for row in matrix.rows()}
    assert {"cpu", "11.8", "12.1", "12.4", "12.6", "13.0"} <= set(rows)
    assert "sm_90a" not in rows["11.8"].targets
    assert all(pythons for row in rows.values() for pythons in row.torch.values())
    assert all(row.nvrtc for cuda, row in rows.items() if cuda != "cpu")


@pytest.mark.parametrize(
    ("version", "annotation", "cuda", "expected"),
    [
        ("2.2.2+cu118", "", "'11.8'", TorchBuild("2.2.2", "11.8")),
        ("2.13.0+cpu", ": Optional[str]", "None", TorchBuild("2.13.0", None)),
        ("2.11.0a0+git1234", ": str | None", "'13.0'", TorchBuild("2.11.0a0", "13.0")),
    ],
    ids=["cu118", "cpu", "self-built"],
)
def test_torch_is_read_off_its_version_file(
    version: str, annotation: str, cuda: str, expected: TorchBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(VERSION_PY.format(version=version, annotation=annotation, cuda=cuda))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    build = matrix.torch_build()
    assert build == expected
    assert build is not None
    assert build.minor == ".".join(version.split(".")[:2])


def test_a_missing_matrix_is_an_installation_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_HERE", tmp_path)
    matrix.rows.cache_clear()
    with pytest.raises(InstallationError, match="reinstall flashinfer-core"):
        matrix.rows()
