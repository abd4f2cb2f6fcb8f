"""Each way in which an installation goes wrong has its own message and command; a sound one has none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flashinfer_core import diagnosis
from flashinfer_core.device import Cpu, Gpu
from flashinfer_core.doctor import Facts, render
from flashinfer_core.matrix import Row, TorchBuild
from flashinfer_core.targets import target_named

H100 = Gpu(0, "H100", (9, 0), 132, 232448, 80 << 30, 50 << 20, "uuid")
V100 = dataclasses.replace(H100, ordinal=1, name="V100", capability=(7, 0))
PYTHONS = ("3.9", "3.11")
ROWS = (
    Row("cpu", {"2.5": PYTHONS, "2.13": ("3.11",)}),
    Row("12.4", {"2.4": PYTHONS, "2.5": PYTHONS}, "nvidia-cuda-nvrtc-cu12==12.4.127"),
    Row("13.0", {"2.11": ("3.11",)}, "nvidia-cuda-nvrtc==13.0.88"),
)
SOUND = Facts(
    python="3.11.7",
    machine="x86_64",
    torch=TorchBuild("2.5.1", "12.4"),
    versions=dict.fromkeys(("flashinfer-python", "flashinfer-core", "flashinfer-page"), "0.1.0+cu124torch2.5"),
    cpu=Cpu("x86_64", "Some CPU", frozenset(target_named("x86_64_v3").cpu_flags)),
    driver=12040,
    gpus=(H100,),
    images={"flashinfer_page": {"sm_90": 4, "x86_64_v2": 4}},
    nvrtc_path="/lib/libnvrtc.so.12",
    nvrtc_version="12.4",
    cache={"/home/me/.cache/flashinfer-images": "No such file or directory"},
)

# kind of problem: facts that differ from SOUND, words of the message, words of the command
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "mismatch": (
        {"versions": {"flashinfer-core": "0.1.0+cu130torch2.11"}},
        "the wheels are for cu130torch2.11, and torch is 2.5.1 for CUDA 12.4",
        "pip install --force-reinstall -i INDEX/cu124/torch2.5/ flashinfer-python",
    ),
    "device": (
        {"gpus": (H100, V100)},
        "GPU 1 (V100): a GPU of compute capability 7.0 is too old: kernels need 7.5",
        "run on the CPU",
    ),
    "name": (
        {"versions": {**SOUND.versions, "flashinfer": "0.2"}},
        "`flashinfer` 0.2 is another project's",
        "pip uninstall -y flashinfer && pip install --force-reinstall flashinfer-python",
    ),
    "combination": (
        {"torch": TorchBuild("2.7.0", "12.8"), "driver": 12080},
        "there is no wheel for torch 2.7 with CUDA 12.8 on Python 3.11",
        "pip install 'torch==2.11.*' --index-url https://download.pytorch.org/whl/cu130 && "
        "pip install -i INDEX/cu130/torch2.11/ flashinfer-python",
    ),
    "torch": ({"torch": None}, "torch is not installed", "pip install torch"),
    "driver": (
        {"torch": TorchBuild("2.11.0", "13.0"), "versions": {}},
        "the driver runs CUDA 12.4 at most, and torch is built for 13.0",
        "update the driver",
    ),
    "host": (
        {"host_error": "No module named 'flashinfer_core._host'", "gpus": ()},
        "the host extension does not load in Python 3.11.7",
        "pip install --force-reinstall flashinfer-core",
    ),
    "versions": (
        {"versions": {**SOUND.versions, "flashinfer-page": "0.0.9+cu124torch2.5"}},
        "different builds: flashinfer-python 0.1.0+cu124torch2.5, ",
        "flashinfer-page==0.1.0+cu124torch2.5",
    ),
    "images": (
        {"images": {"flashinfer_page": {"sm_90": 4}}},
        "flashinfer_page has no image for this CPU (any of x86_64_v3, x86_64_v2)",
        "pip install --force-reinstall flashinfer-page",
    ),
}

# variables that are set: words of the message, words of the remedy
VARIABLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "FLASHINFER_CPU_TARGET=avx512": (
        {},
        "FLASHINFER_CPU_TARGET=avx512 is not a target of cpu kernels",
        "unset it, or use one of: x86_64_v3, x86_64_v2",
    ),
    "FLASHINFER_CPU_TARGET=x86_64_v4": (
        {},
        "FLASHINFER_CPU_TARGET=x86_64_v4 cannot run on this CPU",
        "unset it, or use one of: x86_64_v3, x86_64_v2",
    ),
    "FLASHINFER_CUDA_TARGET=sm_80": (
        {},
        "FLASHINFER_CUDA_TARGET=sm_80 cannot run on GPU 0 (H100)",
        "unset it, or use one of: sm_90a, sm_90, compute_90",
    ),
    "FLASHINFER_CUDA_TARGET=hopper": (
        {"gpus": ()},
        "FLASHINFER_CUDA_TARGET=hopper is not a target of cuda kernels",
        "unset it, or use one of: sm_75, sm_80",
    ),
    "FLASHINFER_NUM_THREADS=two": (
        {},
        "FLASHINFER_NUM_THREADS=two is not a number of threads",
        "unset it, or use a number from 1 to 4096",
    ),
}


def test_a_sound_installation_has_no_problem() -> None:
    assert diagnosis.problems(SOUND, ROWS) == []
    assert diagnosis.notes(SOUND) == []


@pytest.mark.parametrize("kind", CASES)
def test_problem_is_named_with_the_command_that_mends_it(kind: str) -> None:
    changes, what, command = CASES[kind]
    facts = dataclasses.replace(SOUND, **changes)
    [problem] = diagnosis.problems(facts, ROWS)
    assert problem.kind == kind
    assert what in problem.what
    assert command in problem.remedy
    text = render(facts, [problem], [])
    assert f"problem: {problem.what}\n  mend: {problem.remedy}" in text
    assert text.endswith("1 problem(s) found")


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_no_kernel_can_follow_is_named_with_what_it_may_be(variable: str) -> None:
    changes, what, remedy = VARIABLES[variable]
    facts = dataclasses.replace(SOUND, environment=dict([variable.split("=")]), **changes)
    [problem] = diagnosis.problems(facts, ROWS)
    assert problem.kind == "environment"
    assert what in problem.what
    assert remedy in problem.remedy


def test_a_forced_target_must_have_its_images() -> None:
    for name, problems in (("x86_64_v2", 0), ("x86_64_v3", 1)):
        facts = dataclasses.replace(SOUND, environment={"FLASHINFER_CPU_TARGET": name})
        assert len(diagnosis.problems(facts, ROWS)) == problems
    [problem] = diagnosis.problems(facts, ROWS)
    assert "flashinfer_page has no image for this CPU (any of x86_64_v3)" in problem.what


def test_the_nearest_wheel_keeps_cuda_where_it_can() -> None:
    facts = dataclasses.replace(SOUND, torch=TorchBuild("2.9.0", None), versions={})
    [problem] = diagnosis.problems(facts, ROWS)
    assert "torch 2.9 with no CUDA" in problem.what
    assert "'torch==2.13.*' --index-url https://download.pytorch.org/whl/cpu" in problem.remedy
    facts = dataclasses.replace(SOUND, python="3.7.1")
    [problem] = diagnosis.problems(facts, ROWS)
    assert "Python 3.7 is in no row" in problem.remedy


def test_a_gpu_image_that_can_be_compiled_is_no_problem() -> None:
    images = {"flashinfer_page": {"x86_64_v2": 4}}
    assert diagnosis.problems(dataclasses.replace(SOUND, images=images), ROWS) == []
    [problem] = diagnosis.problems(dataclasses.replace(SOUND, images=images, nvrtc_path=""), ROWS)
    assert "no image for GPU 0 (H100) (any of sm_90a, sm_90, compute_90" in problem.what


def test_notes() -> None:
    facts = dataclasses.replace(
        SOUND,
        torch=TorchBuild("2.5.1", None),
        cpu=Cpu("x86_64", "Some CPU", frozenset({"amx_bf16"})),
        nvrtc_error="none",
        cache={"/a": "Permission denied"},
        environment={"FLASHINFER_THREADS": "2", "FLASHINFER_NUM_THREADS": "2", "CUDA_HOME": "/usr/local/cuda"},
    )
    assert [note.split(":")[0].split(",")[0] for note in diagnosis.notes(facts)] == [
        "torch was built without CUDA",
        "Linux does not let this process use AMX",
        "no NVRTC",
        "no cache folder is usable",
        "this library reads no variable FLASHINFER_THREADS; docs/images.md lists those that it reads",
    ]
