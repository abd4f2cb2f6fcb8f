"""Every shipped variant of every package compiles for every target: registers, spills, shared memory.

FLASHINFER_TARGETS chooses the list (default: this machine's best CPU level, and sm_75, sm_80 and sm_90a: the code paths
that differ; PTX comes out of the same front end as the cubin of its version, and `nox -s images` covers all chips).
"""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path

import pytest

from flashinfer_core import build, headers, targets
from flashinfer_core.device import candidates
from flashinfer_core.targets import target_named
from tiny_package import needs_nvrtc

pytestmark = pytest.mark.compile

PACKAGES = ("flashinfer_attention", "flashinfer_lora", "flashinfer_page")
DEFAULT = (candidates("cpu")[0], "sm_75", "sm_80", "sm_90a")
CHOSEN = targets.expand((os.environ.get("FLASHINFER_TARGETS") or ",".join(DEFAULT)).split(","), platform.machine())

# Bytes of dynamic and static shared memory that one CTA may use, and registers of an SM.
SHARED_LIMIT = {(7, 5): 64 << 10, (8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
REGISTERS_OF_SM = 65536


def _cases() -> list[object]:
    return [
        pytest.param(
            package, target, id=f"{package}-{target}", marks=[] if target_named(target).is_cpu else needs_nvrtc
        )
        for package in PACKAGES
        for target in CHOSEN
    ]


@pytest.mark.parametrize(("package", "target"), _cases())
def test_shipped_variants_compile_within_limits(package: str, target: str, tmp_path: Path) -> None:
    shipped = importlib.import_module(f"{package}.variants").shipped
    variants = {variant.name: variant for variant in shipped(target)}
    assert len(variants) == len(shipped(target)) > 0
    built = build.build_images(headers.package_folder(package) / "kernels", shipped, [target], tmp_path)
    assert {one.image.name for one in built} == set(variants)
    print(build.table(built))
    for one in built:
        image, variant = one.image, variants[one.image.name]
        assert image.payload
        if target_named(target).kind == "cubin":
            assert image.spill_bytes is not None
            assert image.spill_bytes == 0, image.name
            assert image.registers is not None
            assert image.registers * variant.threads <= REGISTERS_OF_SM, image.name
            assert image.shared_bytes is not None
            assert image.shared_bytes + variant.shared_bytes <= SHARED_LIMIT[target_named(target).capability], (
                image.name
            )
