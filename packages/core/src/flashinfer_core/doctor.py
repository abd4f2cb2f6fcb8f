"""What is installed, what it can run on, and what is wrong with it: `python -m flashinfer_core`, `flashinfer doctor`.

Gathering asks the machine and never fails; judging (diagnosis.py) is a pure function of what was gathered. Works
without torch, GPU or driver, and imports none of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections import Counter
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from flashinfer_core import cache, device, headers, nvrtc
from flashinfer_core.console import say
from flashinfer_core.errors import FlashInferError
from flashinfer_core.matrix import TorchBuild, torch_build

DISTRIBUTIONS = ("flashinfer-python", "flashinfer-core", "flashinfer-attention", "flashinfer-page", "flashinfer-lora")
_VARIABLES = ("FLASHINFER_", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "CXX")


@dataclass(frozen=True)
class Facts:
    """All that doctor knows. `driver` is 1000 * major + 10 * minor; texts ending in _error say why a fact is absent.

    `versions` maps distributions to versions, `images` maps packages to counts by target, `cache` maps folders to
    what is wrong with them (empty: usable).
    """

    python: str
    machine: str
    torch: TorchBuild | None
    versions: Mapping[str, str]
    cpu: device.Cpu
    driver: int | None = None
    driver_error: str = ""
    host_error: str = ""
    gpus: tuple[device.Gpu, ...] = ()
    images: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    nvrtc_path: str = ""
    nvrtc_version: str = ""
    nvrtc_error: str = ""
    cache: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def gather() -> Facts:
    """Ask this machine."""
    facts: dict[str, Any] = {}
    try:
        facts["driver"] = device.driver_version()
        facts["gpus"] = tuple(device.gpus())
    except ImportError as error:
        facts["host_error"] = str(error)
    except FlashInferError as error:
        facts["driver_error"] = str(error).splitlines()[0]
    try:
        library = nvrtc.find()
        facts.update(nvrtc_path=library.path, nvrtc_version=library.version_text)
    except FlashInferError as error:
        facts["nvrtc_error"] = str(error)
    return Facts(
        python=platform.python_version(),
        machine=platform.machine(),
        torch=torch_build(),
        versions=_versions(),
        cpu=device.cpu(),
        images={name: _images(name) for name in headers.KERNEL_PACKAGES if importlib.util.find_spec(name)},
        cache={str(folder): cache.rejection(folder) for folder in cache.folders()},
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        **facts,
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in (*DISTRIBUTIONS, "flashinfer"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _images(package: str) -> dict[str, int]:
    found = (headers.package_folder(package) / "images").glob("*/*.image")
    return dict(sorted(Counter(path.parent.name for path in found).items()))


def render(facts: Facts, problems: Sequence[Any], notes: Sequence[str]) -> str:
    """Format facts and findings for people."""
    torch = f"{facts.torch.version}, CUDA {facts.torch.cuda or 'none'}" if facts.torch else "not installed"
    driver = f"runs CUDA {facts.driver // 1000}.{facts.driver % 1000 // 10}" if facts.driver else facts.driver_error
    rows: list[tuple[str, str]] = [
        ("python", f"{facts.python} on {facts.machine}"),
        ("torch", torch),
        *((name, version) for name, version in facts.versions.items()),
        ("cpu", f"{facts.cpu.model or facts.machine}: {_targets_of_cpu(facts)}"),
        ("driver", driver or "the host extension is not installed"),
    ]
    rows += [(f"gpu {gpu.ordinal}", _describe(gpu)) for gpu in facts.gpus]
    for package, images in facts.images.items():
        counts = [f"{count} for {target}" for target, count in images.items()]
        rows.append((package, f"images: {', '.join(counts) or 'none'}"))
    rows.append(("nvrtc", f"{facts.nvrtc_version} at {facts.nvrtc_path}" if facts.nvrtc_path else "none"))
    rows += [("cache", f"{folder}: {why or 'usable'}") for folder, why in facts.cache.items()]
    rows += [("environment", f"{name}={value}") for name, value in facts.environment.items()]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    lines += [f"note: {note}" for note in notes]
    for problem in problems:
        lines += ["", f"problem: {problem.what}", f"  mend: {problem.remedy}"]
    return "\n".join([*lines, "", "no problem found" if not problems else f"{len(problems)} problem(s) found"])


def _targets_of_cpu(facts: Facts) -> str:
    from flashinfer_core.targets import cpu_candidates

    try:
        return ", ".join(cpu_candidates(facts.cpu.machine, facts.cpu.flags))
    except FlashInferError as error:
        return str(error).splitlines()[0]


def _describe(gpu: device.Gpu) -> str:
    major, minor = gpu.capability
    return f"{gpu.name}, sm_{major}{minor}, {gpu.sm_count} SMs, {gpu.total_memory >> 20} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return 1 where there is a problem, else 0."""
    from flashinfer_core import diagnosis

    parser = argparse.ArgumentParser(prog="flashinfer doctor", description="say what is installed and what is wrong")
    parser.add_argument("--json", action="store_true", help="print facts and problems for machines")
    options = parser.parse_args(arguments)
    facts = gather()
    problems, notes = diagnosis.problems(facts), diagnosis.notes(facts)
    if options.json:
        content = {**dataclasses.asdict(facts), "problems": [dataclasses.asdict(p) for p in problems], "notes": notes}
        say(json.dumps(content, indent=2, default=sorted))
    else:
        say(render(facts, problems, notes))
    return 1 if problems else 0
