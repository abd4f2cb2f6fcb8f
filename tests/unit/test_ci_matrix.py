"""The matrix: every row is whole, and the choice of a row for a machine is right."""

from __future__ import annotations

import pytest

from ci import facts, matrix
from flashinfer_core import targets

DATA = matrix.load()
BUILDS = matrix.builds(DATA)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.directory)
def test_every_build_is_whole(build: matrix.Build) -> None:
    assert build.release.startswith(build.torch + ".")
    assert build.pythons
    assert (build.cuda == "cpu") == (not build.nvrtc) == (not build.targets)
    for target in build.targets:
        assert not targets.target_named(target).is_cpu
    if build.nvrtc:
        assert build.nvrtc.split("==")[1].startswith(build.cuda + ".")


def test_directories_are_distinct() -> None:
    assert len({build.directory for build in BUILDS}) == len(BUILDS)
    assert len({build.local_version for build in BUILDS}) == len(BUILDS)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_cpu_targets_are_known(machine: str) -> None:
    assert targets.expand(["cpu"], machine) == list(matrix.cpu_targets(DATA, machine))


def test_unknown_machines_have_none() -> None:
    with pytest.raises(LookupError, match="riscv64"):
        matrix.cpu_targets(DATA, "riscv64")


def test_names_of_a_build() -> None:
    build = matrix.named(DATA, "cu130/torch2.11")
    assert (build.platform, build.local_version) == ("cu130", "cu130torch2.11")
    assert matrix.named(DATA, "cpu/torch2.13").local_version == "cputorch2.13"


def test_unknown_directories_list_the_known() -> None:
    with pytest.raises(LookupError, match=r"cpu/torch2\.13"):
        matrix.named(DATA, "cu999/torch2.11")


@pytest.mark.parametrize(
    ("cuda", "python", "torch"), [("cpu", "3.8", "2.4"), ("cpu", "3.9", "2.6"), ("12.4", "3.8", "2.4")]
)
def test_newest_compares_versions_as_numbers(cuda: str, python: str, torch: str) -> None:
    assert matrix.newest(DATA, cuda, python).torch == torch


def test_newest_torch_is_not_the_alphabetically_last() -> None:
    assert matrix.newest(DATA, "cpu", "3.11").torch == "2.13"


def test_newest_without_a_torch_for_this_python() -> None:
    with pytest.raises(LookupError, match=r"3\.7"):
        matrix.newest(DATA, "cpu", "3.7")


def test_facts_of_a_cuda_build_ask_for_its_nvrtc() -> None:
    build = matrix.named(DATA, "cu124/torch2.5")
    known = facts.facts(build, has_compiler=True)
    assert known["torch"] == "torch==2.5.1"
    assert known["build"] == [build.nvrtc]
    assert str(known["index"]).endswith("/build/index/cu124/torch2.5/")


def test_facts_without_a_compiler_ask_for_one() -> None:
    known = facts.facts(matrix.named(DATA, "cpu/torch2.13"), has_compiler=False)
    assert len(known["build"]) == 1
    assert known["build"][0].startswith("ziglang==")
    assert known["nvrtc"], "compile tests need NVRTC on a machine without a GPU too"
