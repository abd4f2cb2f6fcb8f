"""What is wrong with an installation, judged from facts alone, each with the command that mends it.

`INDEX` in a command stands for the address of the wheel index that the packages came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Callable, Sequence

from flashinfer_core import matrix, settings
from flashinfer_core.errors import FlashInferError, InstallationError, InvalidArgumentError, UnsupportedDeviceError
from flashinfer_core.targets import cpu_candidates, cuda_candidates

if TYPE_CHECKING:
    from flashinfer_core.doctor import Facts

_TORCH_INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Problem:
    """One thing that keeps kernels from running. `kind` is a stable word for machines."""

    kind: str
    what: str
    remedy: str


def problems(facts: Facts, rows: Sequence[matrix.Row] | None = None) -> list[Problem]:
    """Return what is wrong; `rows` replaces the support matrix."""
    found: list[Problem] = []
    if rows is None:
        try:
            rows = matrix.rows()
        except InstallationError as error:
            found.append(Problem("matrix", error.args[0].splitlines()[0], error.remedy))
            rows = ()
    judges = (_name, _host, _packages, partial(_torch, rows=rows), _devices, _environment)
    return [*found, *(problem for judge in judges for problem in judge(facts))]


def notes(facts: Facts) -> list[str]:
    """Return what is worth knowing and breaks nothing."""
    found: list[str] = []
    if facts.gpus and facts.torch and not facts.torch.cuda:
        found.append("torch was built without CUDA, so everything runs on the CPU although there is a GPU")
    if "amx_bf16" in facts.cpu.flags and "amx_tile" not in facts.cpu.flags:
        found.append("Linux does not let this process use AMX, so kernels run without it; Linux 5.16 and newer do")
    if facts.nvrtc_error:
        found.append("no NVRTC: a kernel that does not ship cannot be compiled; pip install nvidia-cuda-nvrtc")
    if facts.cache and not any(why in ("", "No such file or directory") for why in facts.cache.values()):
        found.append("no cache folder is usable: kernels compiled at run time are kept in memory only")
    strange = [name for name in facts.environment if name.startswith("FLASHINFER_") and name not in settings.KNOWN]
    if strange:
        found.append(f"this library reads no variable {', '.join(strange)}; docs/images.md lists those that it reads")
    return found


def _name(facts: Facts) -> list[Problem]:
    if "flashinfer" not in facts.versions:
        return []
    version = facts.versions["flashinfer"]
    what = f"`flashinfer` {version} is another project's distribution; ours is `flashinfer-python`"
    return [Problem("name", what, "pip uninstall -y flashinfer && pip install --force-reinstall flashinfer-python")]


def _host(facts: Facts) -> list[Problem]:
    if not facts.host_error:
        return []
    what = f"the host extension does not load in Python {facts.python} on {facts.machine}: {facts.host_error}"
    return [Problem("host", what, "pip install --force-reinstall flashinfer-core, for this very Python")]


def _packages(facts: Facts) -> list[Problem]:
    ours = {name: version for name, version in facts.versions.items() if name != "flashinfer"}
    if len(set(ours.values())) < 2:
        return []
    listed = ", ".join(f"{name} {version}" for name, version in ours.items())
    wanted = ours.get("flashinfer-python") or ours.get("flashinfer-core") or next(iter(ours.values()))
    command = "pip install --force-reinstall " + " ".join(f"{name}=={wanted}" for name in ours)
    return [Problem("versions", f"the packages are of different builds: {listed}", command)]


def _torch(facts: Facts, rows: Sequence[matrix.Row]) -> list[Problem]:
    torch = facts.torch
    if torch is None:
        command = f"pip install torch --index-url {_TORCH_INDEX}/cpu, or without --index-url for GPUs"
        return [Problem("torch", "torch is not installed; attention, page and lora need it", command)]
    found: list[Problem] = []
    has = f"{matrix.short_cuda(torch.cuda)}torch{torch.minor}"
    row = next((row for row in rows if matrix.short_cuda(row.cuda) == matrix.short_cuda(torch.cuda)), None)
    python = ".".join(facts.python.split(".")[:2])
    fits = row is not None and python in row.torch.get(torch.minor, ())
    wheel = facts.versions.get("flashinfer-core", "").partition("+")[2]
    if rows and not fits:
        what = f"there is no wheel for torch {torch.minor} with {_cuda(torch.cuda)} on Python {python}"
        found.append(Problem("combination", what, _nearest(torch, python, rows)))
    elif wheel and wheel != has:
        what = f"the wheels are for {wheel}, and torch is {torch.version} for {_cuda(torch.cuda)}"
        folder = f"{matrix.short_cuda(torch.cuda)}/torch{torch.minor}"
        found.append(Problem("mismatch", what, f"pip install --force-reinstall -i INDEX/{folder}/ flashinfer-python"))
    if torch.cuda and facts.driver and facts.driver // 1000 < int(torch.cuda.split(".")[0]):
        runs = f"{facts.driver // 1000}.{facts.driver % 1000 // 10}"
        what = f"the driver runs CUDA {runs} at most, and torch is built for {torch.cuda}"
        remedy = f"update the driver, or install an older torch: pip install torch --index-url {_TORCH_INDEX}/cu126"
        found.append(Problem("driver", what, remedy))
    return found


def _cuda(cuda: str | None) -> str:
    return f"CUDA {cuda}" if cuda else "no CUDA"


def _nearest(torch: matrix.TorchBuild, python: str, rows: Sequence[matrix.Row]) -> str:
    """Return the command for the wheel that asks for the smallest change: same CUDA, else the newest of all."""
    choices = [(row, version) for row in rows for version, pythons in row.torch.items() if python in pythons]
    if not choices:
        return f"use a Python that torch has wheels for; Python {python} is in no row of the support matrix"
    same = [choice for choice in choices if matrix.short_cuda(choice[0].cuda) == matrix.short_cuda(torch.cuda)]
    kind = [choice for choice in choices if (choice[0].cuda == "cpu") == (torch.cuda is None)]
    row, version = max(same or kind or choices, key=lambda choice: _number(choice[1]))
    where = matrix.short_cuda(row.cuda)
    return (
        f"pip install 'torch=={version}.*' --index-url {_TORCH_INDEX}/{where} && "
        f"pip install -i INDEX/{row.folder(version)}/ flashinfer-python"
    )


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _devices(facts: Facts) -> list[Problem]:
    """Judge each device: whether it runs any target, the one that is forced on it, and who has no image for it."""
    found: list[Problem] = []
    devices: list[tuple[str, str, Callable[[], list[str]]]] = [
        ("cpu", "this CPU", partial(cpu_candidates, facts.cpu.machine, facts.cpu.flags)),
        *(("cuda", f"GPU {gpu.ordinal} ({gpu.name})", partial(cuda_candidates, gpu.capability)) for gpu in facts.gpus),
    ]
    for kind, label, candidates in devices:
        forced = facts.environment.get(settings.FORCED_TARGETS[kind])
        try:
            fitting = candidates()
            if forced:
                settings.check_target(kind, forced, fitting, label)
        except UnsupportedDeviceError as error:
            found.append(Problem("device", f"{label}: {_first_line(error)}", error.remedy))
        except InvalidArgumentError as error:
            found.append(Problem("environment", _first_line(error), error.remedy))
        else:
            found += _images(facts, label, [forced] if forced else fitting)
    return found


def _images(facts: Facts, label: str, targets: Sequence[str]) -> list[Problem]:
    on_gpu = label.startswith("GPU")
    if on_gpu and (facts.nvrtc_path or (facts.torch and not facts.torch.cuda)):
        return []  # compiled when needed, or never used
    found: list[Problem] = []
    for package, images in facts.images.items():
        if not any(images.get(target) for target in targets):
            what = f"{package} has no image for {label} (any of {', '.join(targets)})"
            remedy = f"pip install --force-reinstall {package.replace('_', '-')}, or in a source tree: "
            remedy += f"python -m flashinfer_core.compiler {package} --target {targets[0]}"
            found.append(Problem("images", what, remedy))
    return found


def _environment(facts: Facts) -> list[Problem]:
    """Judge what `_devices` cannot: the number of threads, and a target for GPUs where there is none."""
    found: list[Problem] = []
    threads = facts.environment.get(settings.NUM_THREADS)
    forced = facts.environment.get(settings.FORCED_TARGETS["cuda"])
    try:
        if threads:
            settings.parse_threads(threads)
    except InvalidArgumentError as error:
        found.append(Problem("environment", _first_line(error), error.remedy))
    try:
        if forced and not facts.gpus:
            settings.check_target("cuda", forced)
    except InvalidArgumentError as error:
        found.append(Problem("environment", _first_line(error), error.remedy))
    return found


def _first_line(error: FlashInferError) -> str:
    return str(error).splitlines()[0]
