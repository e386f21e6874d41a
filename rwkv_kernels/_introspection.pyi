from typing import TypedDict

class CpuPlan(TypedDict):
    threads: int
    column_channels: int
    columns: int
    chunk_steps: int
    chunks: int

class CpuItem(TypedDict):
    n: int
    row: int
    partials: int
    opens_partials: bool
    spare_checkpoint: int
    t_begin: int
    t_end: int
    c_begin: int
    c_end: int

class PackedCpuPlan(CpuPlan):
    shares: list[list[CpuItem]]

class DeviceLimits(TypedDict):
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    architecture: int

class CudaPlan(TypedDict):
    warps: int
    tile_steps: int
    chunk_tiles: int
    chunks: int
    channel_tiles: int
    anchor: int
    threads: int
    shared_bytes: int
    workspace_bytes: int

def plan_cpu(dtype: str, B: int, T: int, C: int, threads: int) -> CpuPlan: ...
def packed_plan_cpu(dtype: str, cu_seqlens: list[int], C: int, threads: int) -> PackedCpuPlan: ...
def plan_cuda(operation: str, dtype: str, B: int, T: int, C: int, limits: DeviceLimits | None = None) -> CudaPlan: ...
def packed_plan_cuda(
    operation: str, dtype: str, N: int, total: int, C: int, limits: DeviceLimits | None = None
) -> CudaPlan: ...
