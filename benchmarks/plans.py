"""The choice of a schedule for the CUDA kernels, which they otherwise make themselves for every call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rwkv_kernels._extension import extension

SCHEDULES = ("serial", "chunked", "single_pass")

_choices: dict[str, Any] = {}


@contextmanager
def forced_plan(schedule: str | None = None, warps: int | None = None, chunk_len: int | None = None) -> Iterator[None]:
    """Has every launch of this process follow these choices inside the block; None leaves one to the planner.

    A block inside another one that chooses nothing leaves the outer one's choices.
    """
    global _choices
    if schedule is warps is chunk_len is None:
        yield
        return
    outer, _choices = _choices, {"schedule": schedule, "warps": warps, "chunk_len": chunk_len}
    extension.module.force_cuda_plan(**_choices)
    try:
        yield
    finally:
        _choices = outer
        extension.module.force_cuda_plan(**outer)
