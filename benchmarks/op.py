"""The operator by itself: time, bandwidth and memory of every backend, forward and backward."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.device import Call, Device, backends, quartiles, timed
from benchmarks.problem import Problem, Shape, function_of, name_of, written
from benchmarks.records import Record, Row

TITLE = "The operator: minimal bytes (3 tensors forward, 5 backward) over time, against a triad in the same run"
TITLE_OF_MEMORY = "Memory of a training step of the operator, B = 1, its inputs k, v and the gradient of y included"

SHAPES: dict[str, list[Shape]] = {
    "cuda": [
        (8, 1024, 768),
        (32, 1024, 2048),
        (1, 4096, 768),
        (1, 65536, 2560),
        (8, 4096, 4096),
        (1, 16384, 768),
        (64, 512, 1024),
        (1, 128, 768),
        (8, 1, 768),
    ],
    # Not small: eviction also evicts the code, for which a small call would wait. `latency` measures small calls.
    "cpu": [(8, 1024, 768), (1, 16384, 768), (1, 4096, 768), (4, 512, 768)],
    "smoke": [(2, 130, 64), (2, 1, 64)],
}
DTYPES = {
    "cuda": (torch.float32, torch.bfloat16),
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "smoke": (torch.float32, torch.bfloat16),
}
# Shared CPUs change their speed for many seconds at a time; several rounds over all cases show it in the spread.
ROUNDS = {"cuda": 1, "cpu": 4, "smoke": 1}
TENSORS = {"forward": 3, "backward": 5}
# Checkpoints for backward take 12/64 bytes an element more than the minimum.
WITH_CHECKPOINTS = "forward with checkpoints"
OF_A_STEP = 6  # k, v, gy, y, gk, gv
LEAST_ELEMENTS_COUNTED = 2**20  # a process's memory is counted in pages

STEPS = {"cuda": [2**14, 2**15, 2**16, 2**17], "cpu": [2**11, 2**12, 2**13, 2**14], "smoke": [64, 128]}
CHANNELS = 768


def calls_of(problem: Problem, backend: str) -> dict[str, Callable[[], object]]:
    """Forward, forward with checkpoints, and backward, each to be timed separately."""
    function = function_of(backend)
    return {
        "forward": lambda: problem.forward(function),
        WITH_CHECKPOINTS: lambda: function(*problem.leaves),
        "backward": problem.prepare_backward(function),
    }


def planned(backend: str, operation: str, dtype: torch.dtype, shape: Shape) -> dict[str, object]:
    """The planner's plan, empty for a backend without one."""
    if backend != "cuda":
        return {}
    from rwkv_kernels import _introspection  # only an in-place build has it, and only this function needs it

    properties = torch.cuda.get_device_properties(0)
    limits: _introspection.DeviceLimits = {
        "multiprocessors": properties.multi_processor_count,
        "shared_per_block": properties.shared_memory_per_block_optin,
        "shared_per_multiprocessor": properties.shared_memory_per_multiprocessor,
        "architecture": 100 * properties.major + 10 * properties.minor,
    }
    return dict(_introspection.plan_cuda(operation.split()[0], name_of(dtype), *shape, limits))


def run(device: Device, record: Record) -> None:
    """Every shape, dtype and backend, checked against float64 before it is timed; then memory against T."""
    cases = [Case(shape, dtype) for shape in SHAPES[device.scale] for dtype in DTYPES[device.scale]]
    for _ in range(ROUNDS[device.scale]):
        for case in list(cases):
            with record.attempt(f"{case.shape} {case.dtype}"):
                case.measure(device)
                keys = ["shape", "dtype", "operation", "backend"]
                record.add(TITLE, keys, [row for each in cases for row in each.rows()])
                continue
            cases.remove(case)
    _measure_memory(device, record)


@dataclass
class Case:
    """One shape and dtype, and its measurements."""

    shape: Shape
    dtype: torch.dtype
    errors: dict[str, float] = field(default_factory=dict)
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    triad: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    triad_bytes: int = 0

    def measure(self, device: Device) -> None:
        """A round of runs; before the first one, errors and memory."""
        with device.default():
            problem = Problem(self.shape, self.dtype)
        names = backends(device)
        if not self.errors:
            self.errors = {backend: problem.check(function_of(backend)) for backend in names}
            self.extra = {backend: _extra_bytes(device, self.shape, self.dtype, backend) for backend in names}
        prepared = {backend: calls_of(problem, backend) for backend in names}
        self.triad_bytes, triad = device.triad()
        for operation in ("forward", WITH_CHECKPOINTS, "backward"):
            calls = {backend: prepared[backend][operation] for backend in names}
            *seconds, of_triad = device.alternate({**calls, "triad": triad}).values()
            self.triad[operation] += of_triad
            for backend, samples in zip(names, seconds, strict=True):
                self.seconds[operation, backend] += samples

    def rows(self) -> Iterator[Row]:
        """A row for every operation and backend."""
        B, T, C = self.shape
        for (operation, backend), samples in self.seconds.items():
            bandwidth = self.triad_bytes / statistics.median(self.triad[operation])
            tensors = TENSORS[operation.split()[0]]
            achieved = tensors * B * T * C * self.dtype.itemsize / statistics.median(samples)
            yield {
                "shape": written(self.shape),
                "dtype": name_of(self.dtype),
                "operation": operation,
                "backend": backend,
                **timed(samples, "µs"),
                "GB/s": achieved / 1e9,
                "of triad": achieved / bandwidth,
                "extra bytes/element": self.extra[backend].get(operation, "-"),
                "error": self.errors[backend],
                "_plan": planned(backend, operation, self.dtype, self.shape),
                "_triad_quartiles": quartiles(self.triad[operation]),
            }


def _extra_bytes(device: Device, shape: Shape, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Memory beyond inputs, outputs and gradients: of forward alone, and of forward and backward together."""
    elements = shape[0] * shape[1] * shape[2]
    if not device.is_gpu and elements < LEAST_ELEMENTS_COUNTED:
        return {}
    outputs = {"forward": 1, "backward": 3}  # y; y, gk and gv
    peaks = {operation: device.peak_bytes(prepare_operation, shape, dtype, backend, operation) for operation in TENSORS}
    return {
        operation: peak / elements - outputs[operation] * dtype.itemsize
        for operation, peak in peaks.items()
        if peak is not None
    }


def prepare_operation(shape: Shape, dtype: torch.dtype, backend: str, operation: str) -> Call:
    """Forward without gradients, or as "backward" both."""
    problem, function = Problem(shape, dtype), function_of(backend)
    call = problem.forward_and_backward if operation == "backward" else problem.forward
    return lambda: call(function)


def _measure_memory(device: Device, record: Record) -> None:
    steps = STEPS[device.scale]
    rows: list[Row] = []
    slopes: list[Row] = []
    for backend in backends(device):
        for dtype in (torch.float32, torch.bfloat16):
            held = []
            for T in steps:
                peak = device.peak_bytes(prepare_operation, (1, T, CHANNELS), dtype, backend, "backward")
                if peak is None:
                    print("this system does not report a process's peak memory")
                    return
                held.append(peak + 3 * T * CHANNELS * dtype.itemsize)  # k, v and gy were allocated before
                least = OF_A_STEP * T * CHANNELS * dtype.itemsize
                where = {"backend": backend, "dtype": name_of(dtype), "T": T}
                rows.append({**where, "MB": held[-1] / 1e6, "inputs, outputs, gradients, MB": least / 1e6})
                record.add(TITLE_OF_MEMORY, ["backend", "dtype", "T"], rows)
            slope = statistics.linear_regression(steps, held).slope
            least = OF_A_STEP * CHANNELS * dtype.itemsize
            where = {"backend": backend, "dtype": name_of(dtype)}
            slopes.append({**where, "bytes per step": slope, "of what is least": slope / least})
    record.add("Its slope: bytes for every step of T, and as a part of inputs, outputs and gradients", [], slopes)
