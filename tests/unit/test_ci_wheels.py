"""Building wheels: what counts as a change, which compiler and targets a machine gives, how big a bundle may be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

from ci import bundle, compiled, machine, matrix, wheels
from wheel_files import write_wheel

BUILD = matrix.named(matrix.load(), "cu130/torch2.11")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    for name in (
        "packages/core/a.h",
        "packages/core/build/a.o",
        "packages/core/_host.so",
        "ci/matrix.toml",
        "docs/a.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_inputs_are_sources_only(tree: Path) -> None:
    assert [str(path.relative_to(tree)) for path in wheels.inputs()] == ["ci/matrix.toml", "packages/core/a.h"]


def test_digest_sees_bytes_names_and_settings(tree: Path) -> None:
    before = wheels.digest(wheels.inputs(), "cpu")
    assert wheels.digest(wheels.inputs(), "cpu") == before
    assert wheels.digest(wheels.inputs(), "cuda") != before
    (tree / "packages/core/a.h").write_text("other")
    changed = wheels.digest(wheels.inputs(), "cpu")
    (tree / "packages/core/a.h").rename(tree / "packages/core/b.h")
    assert len({before, changed, wheels.digest(wheels.inputs(), "cpu")}) == 3


def test_unchanged_inputs_build_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(command: List[str], cwd: Path, **_: object) -> None:
        built.append(cwd.name)
        write_wheel(Path(command[-1]), cwd.name, "0.1.0")

    monkeypatch.setattr(subprocess, "run", build)
    first = wheels.make(tree / "out", {"A": "1"})
    assert built == list(wheels.PACKAGES)
    assert wheels.make(tree / "out", {"A": "1"}) == first
    assert len(built) == len(wheels.PACKAGES)
    wheels.make(tree / "out", {"A": "2"})
    assert len(built) == 2 * len(wheels.PACKAGES)


def test_a_wheel_over_its_limit_is_refused_each_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(command: List[str], cwd: Path, **_: object) -> None:
        write_wheel(Path(command[-1]), cwd.name, "0.1.0", content="x" * 1000 if cwd.name == "lora" else "")

    monkeypatch.setattr(subprocess, "run", build)
    monkeypatch.setattr(wheels, "LIMIT", 1100)  # zip packs the 1000 bytes to a few
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lora-.* unpacks to"):
            wheels.make(tree / "out", {})
    monkeypatch.setattr(wheels, "LIMIT", 1300)
    assert len(wheels.make(tree / "out", {})) == len(wheels.PACKAGES)


def test_environment_of_a_cuda_build() -> None:
    variables = wheels.environment(BUILD, "sm_90,cpu")
    assert variables["FLASHINFER_LOCAL_VERSION"] == "cu130torch2.11"
    assert variables["FLASHINFER_CUDA"] == "13.0"
    assert variables["FLASHINFER_TARGETS"] == "sm_90,cpu"
    assert "FLASHINFER_TARGETS" not in wheels.environment(BUILD, None)


def test_a_machine_without_gpu_builds_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_targets", list)
    assert wheels.choose(None).cuda == "cpu"
    assert wheels.choose("cu130/torch2.11") == BUILD


def test_a_machine_with_gpu_builds_for_the_newest_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_targets", lambda: ["sm_90"])
    monkeypatch.setattr(wheels, "running_python", lambda: "3.12")
    assert wheels.choose(None).cuda == "13.0"


def test_targets_default_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_targets", lambda: ["sm_80"])
    monkeypatch.setattr(machine, "MACHINE", "x86_64")
    monkeypatch.delenv("FLASHINFER_TARGETS", raising=False)
    assert compiled.targets() == ["x86_64_v2", "x86_64_v3", "x86_64_v4", "x86_64_amx", "sm_80"]
    monkeypatch.setenv("FLASHINFER_TARGETS", "sm_90,cpu")
    assert compiled.targets() == ["sm_90", "x86_64_v2", "x86_64_v3", "x86_64_v4", "x86_64_amx"]


def test_tags_name_python_for_the_extension_alone() -> None:
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert compiled.host_tag() == f"{python}-{python}-{compiled.platform_tag()}"
    assert compiled.images_tag() == f"py3-none-{compiled.platform_tag()}"


@pytest.mark.parametrize(("text", "targets"), [("9.0\n9.0\n", ["sm_90"]), ("8.9\n7.5\n", ["sm_75", "sm_89"]), ("", [])])
def test_capabilities_become_targets(text: str, targets: List[str]) -> None:
    assert machine.parse_capabilities(text) == targets


def test_compiler_is_what_is_asked_or_found_or_comes_from_pypi(tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path)}
    assert machine.compiler({**nothing, "CXX": "clang++ -g"}) == "clang++ -g"
    assert machine.compiler(nothing) == f"{sys.executable} -m ziglang c++"
    assert not machine.has_compiler(nothing)
    (tmp_path / "c++").touch(mode=0o755)
    assert machine.compiler(nothing) == "c++"
    assert machine.has_compiler(nothing)


def test_bundle_holds_index_tests_and_script(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "flashinfer-python", f"0.1.0+{BUILD.local_version}")
    total = bundle.assemble(tmp_path / "bundle", [wheel])
    assert (tmp_path / "bundle/index/cu130/torch2.11/flashinfer-python/index.html").exists()
    assert (tmp_path / "bundle/ci/gpu_run.sh").stat().st_mode & 0o111
    assert (tmp_path / "bundle/tests/wheel_files.py").exists()
    assert total == bundle.size(tmp_path / "bundle")


def test_bundle_over_its_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LIMIT", 1000)
    with pytest.raises(ValueError, match="choose fewer targets"):
        bundle.assemble(tmp_path / "bundle", [write_wheel(tmp_path, "a", f"0.1.0+{BUILD.local_version}")])
