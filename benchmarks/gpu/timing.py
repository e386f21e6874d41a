"""Times, memory and bandwidth of a device: by events on a GPU, by the harness on a CPU."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import harness

Call = Callable[[], object]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Device:
    """Where to measure, and how much of it: a CPU gets sizes that only show that everything runs."""

    type: str  # "cuda" or "cpu"

    @property
    def is_gpu(self) -> bool:
        """Whether there are events, schedules and a count of memory."""
        return self.type == "cuda"

    def alternate(self, calls: dict[str, Call], runs: int = harness.RUNS) -> Seconds:
        """Seconds of each call over several runs, the calls taking turns, none with its data in the cache."""
        if not self.is_gpu:
            return harness.alternate({name: lambda run, call=call: call() for name, call in calls.items()}, runs=2)
        # 1 GiB is beyond every L2, and writing it takes an H100 some 350 µs, in which the CPU has queued what is timed:
        # the events then enclose the kernels alone, not the time to launch them.
        cold = torch.empty(2**30, dtype=torch.int8)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for run in range(-2, runs):
            for name, call in calls.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                cold.zero_()
                # What was written last still waits in the cache to go to memory: these reads send it there.
                cold[: 2**28].view(torch.int64).sum()
                start.record()
                call()
                end.record()
                if run >= 0:
                    events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that the call has held at once, beyond what was held before; None on a CPU."""
        if not self.is_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> tuple[float, list[float]]:
        """Bytes read and written per second by a copy of 1 GiB (on a CPU 1 MiB), and its times."""
        source = torch.ones(2**30 if self.is_gpu else 2**20, dtype=torch.int8)
        target = torch.empty_like(source)
        samples = self.alternate({"copy": lambda: target.copy_(source)})["copy"]
        return 2 * source.numel() / statistics.median(samples), samples
