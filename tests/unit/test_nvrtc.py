"""NVRTC is found in a stated order, rejected with reasons, and its errors quote the offending line."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashinfer_core import compiler, nvrtc
from flashinfer_core.errors import CompileError, InstallationError, UnsupportedDeviceError
from flashinfer_core.matrix import TorchBuild
from tiny_package import GPU, needs_nvrtc, write


def _fake(folder: Path, library: str, builtins: str = "") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / library).write_text("not a library")
    if builtins:
        (folder / f"libnvrtc-builtins.so.{builtins}").write_text("not a library")
    return str(folder / library)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace what this machine has by an empty one: nothing loaded, no toolkit, one folder of packages, no torch."""
    monkeypatch.setattr(nvrtc, "_loaded", lambda: iter(()))
    monkeypatch.setattr(nvrtc, "_LOADER_NAMES", ("libnvrtc.so.nowhere",))
    monkeypatch.setattr("flashinfer_core.matrix.torch_build", lambda: None)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_order_is_process_packages_toolkit_loader(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(machine / "toolkit"))
    loaded = _fake(machine / "elsewhere", "libnvrtc.so.12", "12.8")
    monkeypatch.setattr(nvrtc, "_loaded", lambda: iter([Path(loaded)]))
    expected = [
        (loaded, (12, 8)),
        (_fake(machine / "nvidia/cuda_nvrtc/lib", "libnvrtc.so.12", "12.4"), (12, 4)),
        (_fake(machine / "nvidia/cu13/lib", "libnvrtc.so.13", "13.0"), (13, 0)),
        (_fake(machine / "torch/lib", "libnvrtc-672ee683.so.11.2", "11.8"), (11, 8)),
        (_fake(machine / "toolkit/lib64", "libnvrtc.so"), None),
        ("libnvrtc.so.nowhere", None),
    ]
    # An alternative build and the builtins lie beside the library, and are none.
    _fake(machine / "nvidia/cu13/lib", "libnvrtc.alt.so.13")
    assert sorted((c.path, c.version) for c in nvrtc.candidates()) == sorted(expected)
    assert [c.origin for c in nvrtc.candidates()] == [
        "loaded in this process", *["Python package"] * 3, "CUDA_HOME", "loader path",
    ]  # fmt: skip


def test_the_package_of_torchs_cuda_comes_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = _fake(machine / "nvidia/cuda_nvrtc/lib", "libnvrtc.so.12", "12.4")
    newer = _fake(machine / "nvidia/cu13/lib", "libnvrtc.so.13", "13.0")
    for cuda, first in (("13.0", newer), ("12.6", older)):
        monkeypatch.setattr("flashinfer_core.matrix.torch_build", lambda cuda=cuda: TorchBuild("2.11.0", cuda))
        assert next(nvrtc.candidates()).path == first


def test_every_rejected_candidate_is_listed_with_its_reason(machine: Path) -> None:
    wrong = _fake(machine / "nvidia/cuda_nvrtc/lib", "libnvrtc.so.12", "12.4")
    broken = _fake(machine / "nvidia/cu13/lib", "libnvrtc.so.13", "13.0")
    with pytest.raises(InstallationError) as caught:
        nvrtc.find("13.0")
    text = str(caught.value)
    assert f"{wrong} (Python package): is version 12.4" in text
    assert f"{broken} (Python package): " in text
    assert "invalid ELF header" in text or "file too short" in text
    assert "libnvrtc.so.nowhere (loader path): " in text
    assert text.endswith("pip install 'nvidia-cuda-nvrtc==13.0.*'")


@needs_nvrtc
def test_a_loaded_library_is_found_again_in_the_process() -> None:
    library = nvrtc.find()
    first = next(nvrtc.candidates())
    assert Path(first.path).samefile(library.path)
    assert first.origin == "loaded in this process"
    assert nvrtc.find(library.version_text).version == library.version


@needs_nvrtc
def test_error_quotes_the_offending_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    header = write(tmp_path) / "kernels" / "tiny" / "scale.h"
    header.write_text(header.read_text().replace("int32_t* data;", "integer* data;"))
    with pytest.raises(CompileError) as caught:
        compiler.compile_image(GPU, "sm_80")
    assert 'identifier "integer" is undefined' in caught.value.log
    line = 1 + header.read_text().splitlines().index("  integer* data;")
    assert str(caught.value).endswith(f"the offending line, tiny/scale.h:{line}:\n    integer* data;")
    assert "tiny::scale<3> for sm_80" in str(caught.value)


@needs_nvrtc
def test_a_target_that_the_version_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = nvrtc.find()
    assert library.supports("sm_80")
    assert library.supports("sm_90a") == (library.version >= (12, 0))
    monkeypatch.setattr(library, "version", (11, 8))
    assert not library.supports("sm_90a")
    with pytest.raises(UnsupportedDeviceError, match=r"NVRTC 11\.8 .* cannot compile for sm_90a"):
        compiler.prepare(GPU, "sm_90a")
