"""Times and memory of a device: by events and torch's allocator on a GPU, by the clock and the system on a CPU."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import rwkv_kernels
from benchmarks import footprint
from benchmarks.records import Row

Call = Callable[[], object]
Seconds = dict[str, list[float]]

RUNS = 25
PER_SECOND = {"ms": 1e3, "µs": 1e6}


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) < 2:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4)
    return low, middle, high


def timed(samples: Sequence[float], unit: str = "ms") -> Row:
    """The columns of a measured time: the median, the distance of the quartiles as a part of it, the raw seconds."""
    low, middle, high = quartiles(samples)
    return {
        unit: middle * PER_SECOND[unit],
        "spread": (high - low) / middle,
        "_seconds": [float(f"{sample:.4g}") for sample in samples],
    }


def keep_freed_memory() -> None:
    """Keeps glibc from returning large freed blocks to the system.

    A fresh block costs a page fault for every 4 KiB, several times what a memory-bound kernel takes; a training loop
    meets that once, a benchmark that allocates its outputs would meet it in every run.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, huge = -1, -3, 2**30
        libc.mallopt(M_TRIM_THRESHOLD, huge)
        libc.mallopt(M_MMAP_THRESHOLD, huge)


def powers_of_two(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on, up to `last`."""
    return [first << i for i in range((last // first).bit_length())]


def takes(backend: str, device: str) -> bool:
    """Whether the backend runs on tensors of this type of device, and here."""
    w, nothing = torch.empty(1, device=device), torch.empty(1, 0, 1, device=device)
    try:
        rwkv_kernels.wkv(w, w, nothing, nothing, backend=backend)
    except rwkv_kernels.BackendUnavailable:
        return False
    return True


@dataclass(frozen=True)
class Device:
    """The place of a measurement; `smoke` takes tiny sizes, to see that everything runs."""

    type: str  # one of DEVICES
    smoke: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether there are events, schedules and torch's own count of memory."""
        return self.type == "cuda"

    @property
    def scale(self) -> str:
        """The key of a benchmark's sizes: a type of device, or "smoke"."""
        return "smoke" if self.smoke else self.type

    def default(self) -> AbstractContextManager[object]:
        """Makes this the device of new tensors inside the block; not for timing, as every call pays for a default."""
        return torch.device(self.type) if self.is_gpu else nullcontext()

    def alternate(self, calls: dict[str, Call], runs: int = RUNS, warm_up: int = 2) -> Seconds:
        """Seconds of each call over several runs, none with its data in the cache.

        The calls take turns, so that a change of clock meets all of them.
        """
        if self.smoke:
            runs, warm_up = 2, 1
        clock = _gpu_seconds if self.is_gpu else _cpu_seconds
        # Beyond every cache.
        size = {"cuda": 2**30, "cpu": 2**27, "smoke": 2**20}[self.scale]
        cold = torch.empty(size, dtype=torch.int8, device=self.type)

        def evict() -> None:
            cold.zero_()
            # The last writes are still in the cache: these reads evict them to memory.
            cold[: size // 4].view(torch.int64).sum()
            if self.is_gpu:
                # Some 2 ms, in which the CPU queues the timed call: the events then enclose the kernels alone.
                torch.cuda._sleep(4_000_000)

        turns = [(name, call) for _ in range(warm_up + runs) for name, call in calls.items()]
        seconds: Seconds = {name: [] for name in calls}
        for (name, _), elapsed in zip(turns, clock([call for _, call in turns], evict), strict=True):
            seconds[name].append(elapsed)
        return {name: samples[warm_up:] for name, samples in seconds.items()}

    def patiently(self, calls: dict[str, Call], limit: float) -> Seconds:
        """`alternate` for calls that may be slow: as many runs as take the slowest `limit` seconds, but 3 to 25."""
        first = self.alternate(calls, runs=1, warm_up=1)
        slowest = max(samples[0] for samples in first.values())
        return self.alternate(calls, max(3, min(RUNS, round(limit / slowest))), warm_up=0)

    def synchronize(self) -> None:
        """Waits for all launches."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def triad(self) -> tuple[int, Call]:
        """The reference of bandwidth: the bytes that it moves, and a sum of two large tensors."""
        elements = {"cuda": 2**27, "cpu": 2**23, "smoke": 2**10}[self.scale]
        a, b, target = (torch.ones(elements, device=self.type) for _ in range(3))
        return 3 * a.nbytes, lambda: torch.add(a, b, alpha=2.0, out=target)

    def peak_bytes(self, prepare: Callable[..., Call], *arguments: object) -> int | None:
        """The peak of memory during prepare(*arguments)(), beyond what was held before the call.

        None where the system does not report it. On a CPU it is called in another process, by its name.
        """
        if not self.is_gpu:
            return footprint.peak_bytes(prepare, *arguments)
        with self.default():
            call = prepare(*arguments)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before


def backends(device: Device) -> list[str]:
    """The backends that run on the device, without the oracle."""
    names = [info.name for info in rwkv_kernels.backends() if info.name != "reference"]
    return [name for name in names if takes(name, device.type)]


def _cpu_seconds(calls: list[Call], evict: Call) -> list[float]:
    seconds = []
    for call in calls:
        evict()
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def _gpu_seconds(calls: list[Call], evict: Call) -> list[float]:
    events = []
    for call in calls:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        evict()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
