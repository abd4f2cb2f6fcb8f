"""The C++ extension, packages/core/host/. Private: device.py, kernel.py and planner.py are its typed fronts."""

from typing_extensions import Buffer

class CudaError(RuntimeError): ...
class CudaUnavailableError(CudaError): ...
class BufferTooSmallError(ValueError): ...

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

def driver_version() -> int: ...
def device_count() -> int: ...
def device_facts(device: int) -> dict[str, str | int | tuple[int, int]]: ...
def cuda_load(payload: bytes, entry: str, device: int, threads: int, shared_bytes: int) -> CudaFunction: ...
def cpu_load(payload: bytes) -> CpuFunction: ...
def pool_threads() -> int: ...
def plan(
    q_indptr: int,
    kv_indptr: int,
    kv_len: int,
    num_requests: int,
    group: int,
    kv_heads: int,
    tile_rows: int,
    kv_tile: int,
    causal: bool,
    window_left: int,
    num_workers: int,
    max_partial_rows: int,
    out: int,
    out_bytes: int,
) -> tuple[int, int, int, int]: ...
def plan_offsets(num_workers: int) -> tuple[int, int, int, int]: ...
def plan_bytes(total_q: int, num_requests: int, group: int, kv_heads: int, tile_rows: int, num_workers: int) -> int: ...
def uniform_plan(
    q_len: int,
    kv_len: int,
    group: int,
    kv_heads: int,
    tile_rows: int,
    kv_tile: int,
    causal: bool,
    window_left: int,
    num_workers: int,
    max_partial_rows: int,
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
