"""The operator by itself: time, bandwidth and memory of every backend, forward and backward, gated and not."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.device import Call, Device, backends, quartiles, timed
from benchmarks.problem import Function, Problem, Shape, function_of, name_of, written
from benchmarks.records import Record, Row

TITLE = "The operator: minimal bytes (3 tensors forward, 5 backward; gated 4, 7) over time, against a triad in that run"
TITLE_OF_MEMORY = "Memory of a training step of the operator, B = 1, its inputs and the gradient of y included"

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
RUNS = {"cuda": 25, "cpu": 10, "smoke": 2}  # in a round
TENSORS = {"forward": 3, "backward": 5}
OF_A_GATE = {"forward": 1, "backward": 2}  # r; r and gr
GATES = ("none", "operator", "torch")  # none, the argument r, and torch.sigmoid(r) times the output
# Checkpoints for backward take 12/64 bytes an element more than the minimum.
WITH_CHECKPOINTS = "forward with checkpoints"
OF_A_STEP = 6  # k, v, gy, y, gk, gv; with a gate r and gr
LEAST_ELEMENTS_COUNTED = 2**20  # a process's memory is counted in pages

Way = tuple[str, str]  # one of GATES, a backend

STEPS = {"cuda": [2**14, 2**15, 2**16, 2**17], "cpu": [2**11, 2**12, 2**13, 2**14], "smoke": [64, 128]}
CHANNELS = 768


def gated_by(gate: str, backend: str) -> Function:
    """The operator by a backend, with one of the GATES."""
    function = function_of(backend)
    if gate != "torch":
        return function
    return lambda w, u, k, v, r: torch.sigmoid(r) * function(w, u, k, v)


def tensors_of(operation: str, gate: str) -> int:
    """How many tensors of the size of k an operation has to read or write."""
    name = operation.split()[0]
    return TENSORS[name] + OF_A_GATE[name] * (gate != "none")


def calls_of(problem: Problem, function: Function) -> dict[str, Callable[[], object]]:
    """Forward, forward with checkpoints, and backward, each to be timed separately."""
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
                keys = ["shape", "dtype", "operation", "gate", "backend"]
                record.add(TITLE, keys, [row for each in cases for row in each.rows()])
                continue
            cases.remove(case)
    _measure_memory(device, record)


@dataclass
class Case:
    """One shape and dtype, and its measurements."""

    shape: Shape
    dtype: torch.dtype
    errors: dict[Way, float] = field(default_factory=dict)
    extra: dict[Way, dict[str, float]] = field(default_factory=dict)
    seconds: dict[tuple[str, Way], list[float]] = field(default_factory=lambda: defaultdict(list))
    triad: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    triad_bytes: int = 0

    def measure(self, device: Device) -> None:
        """A round of runs; before the first one, errors and memory."""
        with device.default():
            plain, gated = (Problem(self.shape, self.dtype, gated=gated) for gated in (False, True))
        ways = [(gate, backend) for gate in GATES for backend in backends(device)]
        problems = {way: plain if way[0] == "none" else gated for way in ways}
        if not self.errors:
            for way, problem in problems.items():
                # A 16-bit output that torch gates is rounded three times, and not ours to judge.
                of = problem.error if way[0] == "torch" else problem.check
                self.errors[way] = of(gated_by(*way))
                self.extra[way] = _extra_bytes(device, self.shape, self.dtype, *way)
        prepared = {way: calls_of(problem, gated_by(*way)) for way, problem in problems.items()}
        self.triad_bytes, triad = device.triad()
        for operation in ("forward", WITH_CHECKPOINTS, "backward"):
            calls = {", ".join(way): prepared[way][operation] for way in ways}
            *seconds, of_triad = device.alternate({**calls, "triad": triad}, RUNS[device.scale]).values()
            self.triad[operation] += of_triad
            for way, samples in zip(ways, seconds, strict=True):
                self.seconds[operation, way] += samples

    def rows(self) -> Iterator[Row]:
        """A row for every operation, gate and backend."""
        B, T, C = self.shape
        for (operation, way), samples in self.seconds.items():
            gate, backend = way
            bandwidth = self.triad_bytes / statistics.median(self.triad[operation])
            least = tensors_of(operation, gate) * B * T * C * self.dtype.itemsize
            achieved = least / statistics.median(samples)
            yield {
                "shape": written(self.shape),
                "dtype": name_of(self.dtype),
                "operation": operation,
                "gate": gate,
                "backend": backend,
                **timed(samples, "µs"),
                "GB/s": achieved / 1e9,
                "of triad": achieved / bandwidth,
                "extra bytes/element": self.extra[way].get(operation, "-"),
                "error": self.errors[way],
                "_plan": planned(backend, operation, self.dtype, self.shape),
                "_triad_quartiles": quartiles(self.triad[operation]),
            }


def _extra_bytes(device: Device, shape: Shape, dtype: torch.dtype, gate: str, backend: str) -> dict[str, float]:
    """Memory beyond inputs, outputs and gradients: of forward alone, and of forward and backward together."""
    elements = shape[0] * shape[1] * shape[2]
    if not device.is_gpu and elements < LEAST_ELEMENTS_COUNTED:
        return {}
    outputs = {"forward": 1, "backward": 3 + (gate != "none")}  # y; y, gk, gv and gr
    peaks = {name: device.peak_bytes(prepare_operation, shape, dtype, gate, backend, name) for name in TENSORS}
    return {
        operation: peak / elements - outputs[operation] * dtype.itemsize
        for operation, peak in peaks.items()
        if peak is not None
    }


def prepare_operation(shape: Shape, dtype: torch.dtype, gate: str, backend: str, operation: str) -> Call:
    """Forward without gradients, or as "backward" both."""
    problem, function = Problem(shape, dtype, gated=gate != "none"), gated_by(gate, backend)
    call = problem.forward_and_backward if operation == "backward" else problem.forward
    return lambda: call(function)


def _measure_memory(device: Device, record: Record) -> None:
    steps = STEPS[device.scale]
    rows: list[Row] = []
    slopes: list[Row] = []
    for gate, backend, dtype in itertools.product(GATES, backends(device), (torch.float32, torch.bfloat16)):
        gated = gate != "none"
        of_a_step = CHANNELS * dtype.itemsize
        where = {"gate": gate, "backend": backend, "dtype": name_of(dtype)}
        held = []
        for T in steps:
            peak = device.peak_bytes(prepare_operation, (1, T, CHANNELS), dtype, gate, backend, "backward")
            if peak is None:
                print("this system does not report a process's peak memory")
                return
            held.append(peak + (3 + gated) * T * of_a_step)  # k, v, gy and r were allocated before
            least = (OF_A_STEP + 2 * gated) * T * of_a_step
            rows.append({**where, "T": T, "MB": held[-1] / 1e6, "inputs, outputs, gradients, MB": least / 1e6})
            record.add(TITLE_OF_MEMORY, [*where, "T"], rows)
        slope = statistics.linear_regression(steps, held).slope
        least = (OF_A_STEP + 2 * gated) * of_a_step
        slopes.append({**where, "bytes per step": slope, "of what is least": slope / least})
    record.add("Its slope: bytes for every step of T, and as a part of inputs, outputs and gradients", [], slopes)
