"""The choices of a plan for the CUDA kernels, which they otherwise make themselves for every call."""

from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_kernels._extension import extension

SCHEDULES = ("serial", "chunked", "single_pass")

Choice = str | int | None

_choices: dict[str, Choice] = {}


@contextmanager
def forced_plan(**choices: Choice) -> Iterator[None]:
    """Has every launch of this process follow these choices inside the block; None leaves one to the planner.

    They are schedule, spans, buffers, chunk_len and group, as `_C.plan_cuda` takes them. A block inside another one
    that chooses nothing leaves the outer one's choices.
    """
    global _choices
    if all(choice is None for choice in choices.values()):
        yield
        return
    outer, _choices = _choices, choices
    extension.module.force_cuda_plan(**choices)
    try:
        yield
    finally:
        _choices = outer
        extension.module.force_cuda_plan(**outer)
