"""The choices of a plan for the CUDA kernels, which they otherwise make themselves for every call."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rwkv_kernels import native

SCHEDULES = ("serial", "chunked", "single_pass")

Choice = str | int | None

_choices: dict[str, Choice] = {}


def _force(
    schedule: Choice = None,
    spans: Choice = None,
    buffers: Choice = None,
    chunk_len: Choice = None,
    group: Choice = None,
) -> None:
    if native.cuda.path is None:
        raise RuntimeError(f"no plan of the CUDA kernels can be forced: {native.cuda.why_missing}")
    force = ctypes.CDLL(str(native.cuda.path)).rwkv_kernels_force_cuda_plan
    force.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 4]
    force.restype = None
    name = None if schedule is None else str(schedule).encode()
    force(name, *(choice or 0 for choice in (spans, buffers, chunk_len, group)))


@contextmanager
def forced_plan(**choices: Choice) -> Iterator[None]:
    """Has every launch of this process follow these choices inside the block; None leaves one to the planner.

    They are schedule, spans, buffers, chunk_len and group, as `_introspection.plan_cuda` takes them. A block inside
    another one that chooses nothing leaves the outer one's choices.
    """
    global _choices
    if all(choice is None for choice in choices.values()):
        yield
        return
    _force(**choices)
    outer, _choices = _choices, choices
    try:
        yield
    finally:
        _choices = outer
        _force(**outer)


def gpu_limits() -> dict[str, int]:
    """What a plan asks of a GPU, of the first one here."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": properties.multi_processor_count,
        "shared_per_block": properties.shared_memory_per_block_optin,
        "shared_per_multiprocessor": properties.shared_memory_per_multiprocessor,
    }


def plan_here(operation: str, dtype: torch.dtype, B: int, T: int, C: int, **choices: Choice) -> dict[str, object]:
    """The CUDA kernels' plan for a problem on the first GPU; raises ValueError for choices that it cannot meet."""
    from rwkv_kernels import _introspection  # of an in-place build alone, and nobody else needs it

    name = str(dtype).removeprefix("torch.")
    return dict(_introspection.plan_cuda(operation, name, B, T, C, gpu_limits(), **choices))
