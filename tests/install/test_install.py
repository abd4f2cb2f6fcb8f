"""Install from the local index into fresh environments: what arrives, what it needs, and that it goes again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import flashinfer_core
from environments import DISTRIBUTIONS, Environment

pytestmark = pytest.mark.install

TREE = Path(__file__).resolve().parents[2]
INSTALLED_BYTES = 40_000_000


@pytest.fixture(scope="module")
def index() -> str:
    """Return the address of the index that `nox -s index` wrote."""
    address = os.environ.get("FLASHINFER_INDEX")
    if not address:
        pytest.skip("FLASHINFER_INDEX names no index; `nox -s tests` makes one")
    return address


@pytest.fixture(scope="module")
def everything(index: str, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Return an environment that has the umbrella."""
    environment = Environment(tmp_path_factory.mktemp("everything"), index)
    environment.install("flashinfer-python")
    return environment


@pytest.fixture
def fresh(index: str, tmp_path: Path) -> Environment:
    """Return an environment that has torch and no flashinfer."""
    return Environment(tmp_path, index)


def test_these_tests_run_on_installed_packages(index: str) -> None:
    assert TREE / "packages" not in Path(flashinfer_core.__file__).resolve().parents, f"not installed from {index}"


def test_the_umbrella_brings_all_and_pip_finds_no_fault(everything: Environment) -> None:
    assert everything.installed() == set(DISTRIBUTIONS)
    assert "No broken requirements found" in everything.pip("check")


@pytest.mark.parametrize("module", DISTRIBUTIONS.values())
def test_every_package_imports(everything: Environment, module: str) -> None:
    assert everything.python(f"import {module}; print({module}.__file__)").startswith(str(everything.site))


def test_all_versions_are_the_same_and_say_what_they_are_for(everything: Environment) -> None:
    code = f"from importlib.metadata import version; print(*{{version(name) for name in {list(DISTRIBUTIONS)}}})"
    (version,) = everything.python(code).split()
    platform, torch = everything.index.rstrip("/").split("/")[-2:]
    assert version == f"{flashinfer_core.__version__}+{platform}{torch}"


def test_installing_again_changes_nothing(everything: Environment) -> None:
    before = everything.files()
    everything.install("flashinfer-python")
    assert everything.files() == before


@pytest.mark.parametrize("name", ["flashinfer-attention", "flashinfer-page", "flashinfer-lora"])
def test_a_kernel_package_needs_core_alone(fresh: Environment, name: str) -> None:
    fresh.install(name)
    assert fresh.installed() == {"flashinfer-core", name}
    assert "No broken requirements found" in fresh.pip("check")
    fresh.python(f"import {DISTRIBUTIONS[name]}")


def test_core_works_without_torch(index: str, tmp_path: Path) -> None:
    bare = Environment(tmp_path, index, with_torch=False)
    bare.install("flashinfer-core")
    assert bare.installed() == {"flashinfer-core"}
    bare.python("import flashinfer_core, sys; assert 'torch' not in sys.modules")
    bare.python("from flashinfer_core import _host; _host.plan_offsets(4, 3)")


def test_doctor_speaks_without_gpu_and_torch(index: str, tmp_path: Path) -> None:
    bare = Environment(tmp_path, index, with_torch=False)
    bare.install("flashinfer-core")
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'flashinfer_core', '--json'])"
    assert json.loads(bare.python(code))


def test_the_command_speaks_without_torch(index: str, tmp_path: Path) -> None:
    bare = Environment(tmp_path, index, with_torch=False)
    bare.install("--no-deps", "flashinfer-core", "flashinfer-python")
    done = bare.script("flashinfer", "doctor")
    assert done.returncode == 1, done.stdout
    assert "problem: torch is not installed" in done.stdout
    assert bare.script("flashinfer", "--version").stdout.strip() == flashinfer_core.__version__


def test_uninstalling_leaves_nothing(fresh: Environment) -> None:
    fresh.install("flashinfer-python")
    fresh.python("import flashinfer")
    fresh.uninstall(*DISTRIBUTIONS)
    assert fresh.files() == fresh.empty


@pytest.mark.parametrize("module", DISTRIBUTIONS.values())
def test_installed_size(everything: Environment, module: str) -> None:
    total = sum(path.stat().st_size for path in (everything.site / module).rglob("*") if path.is_file())
    assert total <= INSTALLED_BYTES


def test_the_host_extension_links_neither_torch_nor_cuda(everything: Environment) -> None:
    (extension,) = (everything.site / "flashinfer_core").glob("_host*.so")
    content = extension.read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart", b"libstdc++.so"):
        assert library not in content


@pytest.mark.parametrize("module", ["flashinfer_attention", "flashinfer_page"])
def test_images_for_this_cpu_are_shipped(everything: Environment, module: str) -> None:
    levels = {path.name for path in (everything.site / module / "images").iterdir()}
    wanted = os.environ.get("FLASHINFER_TARGETS", "cpu")
    if wanted == "cpu":
        assert {"x86_64_v2", "x86_64_v3", "x86_64_v4", "x86_64_amx"} <= levels or "aarch64" in levels
    else:
        assert levels == set(wanted.split(","))
