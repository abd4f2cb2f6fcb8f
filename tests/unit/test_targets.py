"""Which targets run on which device, best first."""

from __future__ import annotations

import pytest

from flashinfer_core import targets
from flashinfer_core.errors import InvalidArgumentError, UnsupportedDeviceError

GPUS = {
    (7, 5): "sm_75 compute_75",
    (8, 0): "sm_80 compute_80 compute_75",
    (8, 6): "sm_86 sm_80 compute_80 compute_75",
    (8, 7): "sm_86 sm_80 compute_80 compute_75",
    (8, 9): "sm_89 sm_86 sm_80 compute_80 compute_75",
    (9, 0): "sm_90a sm_90 compute_90 compute_80 compute_75",
    (10, 0): "compute_90 compute_80 compute_75",
    (12, 1): "compute_90 compute_80 compute_75",
}


@pytest.mark.parametrize("capability", GPUS, ids="{0[0]}.{0[1]}".format)
def test_gpu_prefers_its_own_cubin_then_lower_ones_then_ptx(capability: tuple[int, int]) -> None:
    assert targets.cuda_candidates(capability) == GPUS[capability].split()


@pytest.mark.parametrize("capability", [(7, 0), (6, 1)], ids="{0[0]}.{0[1]}".format)
def test_gpu_before_turing_is_named_with_its_limit(capability: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"capability \d\.\d is too old: kernels need 7\.5"):
        targets.cuda_candidates(capability)


CPU_LEVELS = ["x86_64_v2", "x86_64_v3", "x86_64_v4", "x86_64_amx"]


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_cpu_levels_follow_from_flags(level: str) -> None:
    flags = set(targets.target_named(level).cpu_flags) | {"sse", "hypervisor"}
    assert targets.cpu_candidates("x86_64", flags) == CPU_LEVELS[CPU_LEVELS.index(level) :: -1]


def test_cpu_without_one_flag_of_a_level_falls_below_it() -> None:
    flags = set(targets.target_named("x86_64_v3").cpu_flags) - {"f16c"}
    assert targets.cpu_candidates("x86_64", flags) == ["x86_64_v2"]


def test_arm_has_one_target() -> None:
    assert targets.cpu_candidates("aarch64", {"asimd"}) == ["aarch64"]


@pytest.mark.parametrize(("machine", "text"), [("x86_64", "lacks.*ssse3"), ("riscv64", "'riscv64'")])
def test_unknown_cpu(machine: str, text: str) -> None:
    with pytest.raises(UnsupportedDeviceError, match=text):
        targets.cpu_candidates(machine, {"popcnt"})


def test_groups_expand_in_order_without_repeats() -> None:
    expanded = targets.expand(["sm_90", "cpu", "cuda"], "x86_64")
    assert expanded[:5] == ["sm_90", "x86_64_v2", "x86_64_v3", "x86_64_v4", "x86_64_amx"]
    assert sorted(expanded) == sorted(set(targets.TARGETS) - {"aarch64"})
    assert targets.expand(["cpu"], "aarch64") == ["aarch64"]


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown target 'sm_42'\nknown targets: sm_75, sm_80"):
        targets.expand(["sm_42"], "x86_64")
