"""A kernel that is ready to launch: an image, found and loaded once per process and device."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Callable, NamedTuple, Optional, Sequence, Tuple, Union, cast

from flashinfer_core import device as devices
from flashinfer_core import images, settings
from flashinfer_core.errors import DriverError, MissingImageError
from flashinfer_core.targets import target_named
from flashinfer_core.variant import Variant

Device = Union[str, int]
Factory = Callable[[str], Optional[Variant]]
_Key = Tuple[Variant, Device, str]

_LOADED: dict[_Key, Kernel] = {}
_LOADING: dict[_Key, threading.Lock] = {}  # one lock per kernel: a compile must not hold up others


class Kernel:
    """One variant on one device. Launching is safe from several threads."""

    def __init__(self, variant: Variant, image: images.Image, device: Device, function: Any) -> None:
        self.variant = variant
        self.device = device
        self.target = image.target
        self.registers: int | None = image.registers
        self._function = function

    @property
    def max_workers(self) -> int:
        """Count the workers that run at once: SMs times occupancy on a GPU, threads on a CPU."""
        return devices.num_threads() if self.device == "cpu" else int(self._function.max_workers)

    def launch(self, params: ctypes.Structure, *, workers: int, stream: int = 0) -> None:
        """Run `workers` workers on `params` (taken by value): asynchronously on a GPU's `stream`, to the end on a CPU.

        Raises DriverError where the driver refuses the launch.
        """
        if self.device == "cpu":
            self._function.launch(params, workers, devices.num_threads())
            return
        try:
            self._function.launch(params, workers, stream)
        except RuntimeError as error:
            raise DriverError(f"{self.variant.name} on {self.target}: {error}") from None


class Step(NamedTuple):
    """One launch of a row: its parameters are taken by value. programmatic: see `CudaFunction.launch`."""

    kernel: Kernel
    params: ctypes.Structure
    workers: int
    programmatic: bool = False


class BoundLaunch:
    """Kernels of one device in a row, with parameters that lack only addresses, so that a launch is one cheap call.

    slots: for each address, the step and the field, a pointer, where it belongs. Launching is safe from several
    threads: each has the parameters for itself.
    """

    def __init__(self, steps: Sequence[Step], slots: Sequence[Sequence[Tuple[int, str]]]) -> None:
        from flashinfer_core import _host

        self._on_cpu = steps[0].kernel.device == "cpu"
        self._names = " and ".join(f"{step.kernel.variant.name} on {step.kernel.target}" for step in steps)
        offsets = [[(step, getattr(type(steps[step].params), field).offset) for step, field in slot] for slot in slots]
        bare = [(step.kernel._function, step.params, step.workers, step.programmatic) for step in steps]
        self._bound = _host.bind(bare, offsets)

    def launch(self, addresses: Tuple[int, ...], stream: int = 0) -> None:
        """Run with these addresses: asynchronously on a GPU's `stream`, to the end on a CPU.

        Raises DriverError where the driver refuses a launch.
        """
        try:
            self._bound.launch(addresses, devices.num_threads() if self._on_cpu else stream)
        except RuntimeError as error:
            raise DriverError(f"{self._names}: {error}") from None


def load(variant_or_factory: Variant | Factory, device: Device) -> Kernel:
    """Return the kernel of a variant on `device`: "cpu" or a CUDA ordinal.

    A factory is called with a target's name, best first, and returns the variant for it or None where the target has
    none; for variants whose threads or shared memory depend on the target. Kept per process by (variant, device,
    forced target). Raises UnsupportedDeviceError, MissingImageError, CompileError, DriverError.
    """
    forced = settings.forced_target("cpu" if device == "cpu" else "cuda")
    offered = _offered(variant_or_factory, device) if callable(variant_or_factory) else None
    first = next(iter(offered.values())) if offered else cast(Variant, variant_or_factory)
    key = (first, device, forced)
    kernel = _LOADED.get(key)
    if kernel is None:
        with _LOADING.setdefault(key, threading.Lock()):  # two threads must not both compile it
            kernel = _LOADED.get(key)
            if kernel is None:
                kernel = _open(offered or dict.fromkeys(devices.candidates(device), first), device)
                _LOADED[key] = kernel
    return kernel


def _offered(factory: Factory, device: Device) -> dict[str, Variant]:
    candidates = devices.candidates(device)
    made = {target: factory(target) for target in candidates}
    offered = {target: variant for target, variant in made.items() if variant is not None}
    if not offered:
        raise MissingImageError(f"{factory!r} has no variant for any of {', '.join(candidates)}")
    return offered


def _open(offered: dict[str, Variant], device: Device) -> Kernel:
    image = images.find_first(offered)
    variant = offered[image.target]
    from flashinfer_core import _host

    try:
        if target_named(image.target).is_cpu:
            function: Any = _host.cpu_load(image.payload)
        else:
            function = _host.cuda_load(image.payload, image.entry, int(device), variant.threads, variant.shared_bytes)
    except RuntimeError as error:
        raise DriverError(f"loading {image.name} for {image.target} failed: {error}") from None
    return Kernel(variant, image, device, function)


# In a forked child the threads that held these locks do not exist, so nobody would release them.
os.register_at_fork(after_in_child=_LOADING.clear)
