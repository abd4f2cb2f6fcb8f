"""The C++ extension, packages/core/host/. Private: device.py, kernel.py and planner.py are its typed fronts."""

from collections.abc import Sequence

from typing_extensions import Buffer

class CudaError(RuntimeError): ...
class CudaUnavailableError(CudaError): ...
class BufferTooSmallError(ValueError): ...
class PartialTooSmallError(ValueError): ...

class CudaFunction:
    @property
    def registers(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def max_workers(self) -> int: ...
    def launch(self, params: Buffer, workers: int, stream: int = 0, programmatic: bool = False) -> None: ...

class CpuFunction:
    def launch(self, params: Buffer, workers: int, threads: int) -> None: ...

class BoundLaunch:
    def launch(self, addresses: tuple[int, ...], where: int) -> None: ...

def bind(
    steps: Sequence[tuple[CudaFunction | CpuFunction, Buffer, int, bool]],
    slots: Sequence[Sequence[tuple[int, int]]],
) -> BoundLaunch: ...
def driver_version() -> int: ...
def device_count() -> int: ...
def device_facts(device: int) -> dict[str, str | int | tuple[int, int]]: ...
def cuda_load(payload: bytes, entry: str, device: int, threads: int, shared_bytes: int) -> CudaFunction: ...
def cpu_load(payload: bytes) -> CpuFunction: ...
def pool_threads() -> int: ...

class PlanShape:
    def __init__(
        self,
        group: int,
        kv_heads: int,
        tile_rows: int,
        kv_tile: int,
        causal: bool,
        num_workers: int,
        window_left: int,
        fixed_piece: int,
    ) -> None: ...

def plan(
    shape: PlanShape,
    q_indptr: int,
    kv_indptr: int,
    kv_len: int,
    num_requests: int,
    max_partial_rows: int,
    max_merges: int,
    out: int,
    out_bytes: int,
) -> tuple[int, int, int, int]: ...
def fixed_rows(shape: PlanShape, q_indptr: int, kv_indptr: int, kv_len: int, num_requests: int) -> int: ...
def most_fixed_rows(shape: PlanShape, max_q_len: int, max_kv_len: int) -> int: ...
def read_lengths(
    q_indptr: int,
    kv_indptr: int,
    keys: int,
    num_requests: int,
    page_size: int,
    last_pages: bool,
    out: int,
) -> tuple[int, int, int]: ...
def plan_offsets(num_workers: int, max_merges: int) -> tuple[int, int, int, int]: ...
def plan_limits(shape: PlanShape, total_q: int, num_requests: int) -> tuple[int, int]: ...
def uniform_plan(
    shape: PlanShape, q_len: int, kv_len: int, max_partial_rows: int
) -> tuple[int, int, int, int, int]: ...
def bad_page(
    pages: int,
    entries: int,
    indptr: int,
    requests: int,
    page_size: int,
    num_pages: int,
    q_indptr: int,
    kv_len: int,
    window_left: int,
) -> tuple[int, int, int] | None: ...
def bad_append(
    pages: int,
    entries: int,
    indptr: int,
    requests: int,
    page_size: int,
    num_pages: int,
    batch_indices: int,
    positions: int,
    tokens: int,
    strict: bool,
) -> tuple[str, int, int, int, int] | None: ...
