"""The choice of a schedule for the CUDA kernels, which they otherwise make themselves for every call."""

from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_kernels._extension import extension

SCHEDULES = ("serial", "chunked", "single_pass")


@contextmanager
def forced_plan(schedule: str | None = None, warps: int | None = None, chunk_len: int | None = None) -> Iterator[None]:
    """Has every launch of this process follow these choices inside the block; None leaves one to the planner."""
    if schedule is warps is chunk_len is None:
        yield
        return
    extension.module.force_cuda_plan(schedule=schedule, warps=warps, chunk_len=chunk_len)
    try:
        yield
    finally:
        extension.module.force_cuda_plan()
