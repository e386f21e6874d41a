"""The memory of a call on the CPU, as the system counts it for a process that does nothing else (Linux)."""

import ctypes
import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int | None:
    """`benchmarks.device.Device.peak_bytes`, for a CPU."""
    return _other_process().submit(_measured, prepare, *arguments).result() if CLEAR_REFS.exists() else None


@functools.cache
def _other_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _return_freed_memory)


def _return_freed_memory() -> None:
    """Makes glibc return freed blocks at once: an earlier call's free blocks must not serve the next one unseen."""
    M_MMAP_THRESHOLD, least = -3, 2**16
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, least)


def _measured(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    call = prepare(*arguments)
    call()  # starts threads and loads code
    CLEAR_REFS.write_text("5")  # resets the peak
    before = _peak()
    results = call()
    peak = _peak()
    del results
    return max(0, peak - before)  # the system may reclaim unused pages at any time


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
