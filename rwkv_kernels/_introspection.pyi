from typing import TypedDict

class CpuPlan(TypedDict):
    threads: int
    channel_tile: int
    tiles: int
    span_steps: int
    spans: int

class DeviceLimits(TypedDict):
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int

class CudaPlan(TypedDict):
    operation: str
    dtype: str
    B: int
    T: int
    C: int
    spans: int
    buffers: int
    tile_steps: int
    chunk_len: int
    chunks: int
    channel_tiles: int
    batch_per_launch: int
    group: int
    signal_count: int
    threads: int
    shared_bytes: int
    workspace_bytes: int
    schedule: str
    reason: str

class CudaLaunch(TypedDict):
    kernel: str
    dtype: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: bytes

def plan_cpu(dtype: str, B: int, T: int, C: int, threads: int) -> CpuPlan: ...
def plan_cuda(
    operation: str,
    dtype: str,
    B: int,
    T: int,
    C: int,
    limits: DeviceLimits | None = None,
    *,
    schedule: str | None = None,
    spans: int | None = None,
    buffers: int | None = None,
    chunk_len: int | None = None,
    group: int | None = None,
) -> CudaPlan: ...
def cuda_launches(
    operation: str,
    dtype: str,
    B: int,
    T: int,
    C: int,
    arguments: dict[str, int | str],
    limits: DeviceLimits | None = None,
    *,
    schedule: str | None = None,
    spans: int | None = None,
    buffers: int | None = None,
    chunk_len: int | None = None,
    group: int | None = None,
) -> list[CudaLaunch]: ...
