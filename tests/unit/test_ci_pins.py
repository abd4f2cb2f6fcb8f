"""What wheels depend on: exact siblings and one torch when stamped."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from ci import pins

STAMPED = "0.1.0+cu130torch2.11"
PACKAGES = Path(__file__).resolve().parents[2] / "packages"


def test_version_takes_the_local_part() -> None:
    source = '"""Text."""\n\n__version__ = "1.2.3"\n'
    assert pins.version(source, "") == "1.2.3"
    assert pins.version(source, "cputorch2.13") == "1.2.3+cputorch2.13"


def test_version_must_be_stated() -> None:
    with pytest.raises(ValueError, match="__version__"):
        pins.version("version = 1\n", "")


@pytest.mark.parametrize(("local", "pin"), [("cputorch2.13", "torch==2.13.*"), ("cu118torch2.2", "torch==2.2.*")])
def test_stamped_wheels_pin_torch(local: str, pin: str) -> None:
    assert pins.torch_pin(local) == pin


def test_unstamped_wheels_take_any_supported_torch() -> None:
    assert pins.torch_pin("") == "torch>=2.2"


@pytest.mark.parametrize("local", ["cpu", "cu130", "torch2.11", "cu130torch2", "cu13torch2.11"])
def test_malformed_local_versions_are_refused(local: str) -> None:
    with pytest.raises(ValueError, match=r"cputorch2\.13"):
        pins.torch_pin(local)


def test_core_needs_nothing() -> None:
    assert pins.dependencies("flashinfer-core", STAMPED) == []


@pytest.mark.parametrize("name", pins.KERNEL_PACKAGES)
def test_kernel_packages_need_core_and_torch_alone(name: str) -> None:
    assert pins.dependencies(name, STAMPED) == [f"flashinfer-core=={STAMPED}", "torch==2.11.*"]


def test_the_umbrella_pins_all() -> None:
    assert set(pins.dependencies("flashinfer-python", STAMPED)) == {
        f"flashinfer-core=={STAMPED}",
        *(f"{name}=={STAMPED}" for name in pins.KERNEL_PACKAGES),
        "torch==2.11.*",
    }


def test_the_build_hook_stamps_a_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "FLASHINFER_LOCAL_VERSION": "cu130torch2.11"}
    subprocess.run(command, cwd=PACKAGES / "meta", env=environment, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Metadata.from_email(archive.read(name))
    expected = pins.dependencies("flashinfer-python", str(metadata.version))
    assert wheel.name.endswith("+cu130torch2.11-py3-none-any.whl")
    assert sorted(map(str, metadata.requires_dist or [])) == sorted(expected)
