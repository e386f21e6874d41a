"""What the planner's modelled choices cost: spans, rings and groups of chunks, each by force beside its own."""

import statistics
from collections.abc import Callable

import torch

from benchmarks.device import Device, timed
from benchmarks.op import TENSORS, name_of, written
from benchmarks.plans import Choice, forced_plan, plan_here
from benchmarks.problem import Problem, Shape
from benchmarks.records import Record, Row
from rwkv_kernels import wkv

TITLE = "Choices of the planner, each by force: 1.00 of the fastest is the fastest, and the planner's should be near it"

SHAPES: dict[str, list[Shape]] = {
    "cuda": [(1, 4096, 768), (8, 1024, 768), (1, 65536, 2560), (8, 4096, 4096), (32, 1024, 2048)],
    "smoke": [(1, 300, 64)],
}
Choices = dict[str, Choice]
GROUPS: list[Choices] = [{"schedule": "single_pass", "group": group} for group in (1, 2, 4, 8, 16, 32)]
SPANS: list[Choices] = [{"schedule": "single_pass", "spans": spans} for spans in (1, 2, 4, 8)]
RINGS: list[Choices] = [{"schedule": "serial", "spans": 1, "buffers": buffers} for buffers in (1, 2)]
CHOICES = {"forward": [{}, *GROUPS, *SPANS, *RINGS, {"schedule": "serial", "spans": 4}], "backward": [{}, *GROUPS]}


def run(device: Device, record: Record) -> None:
    """A row for every shape, dtype, operation and choice."""
    rows: list[Row] = []
    for shape in SHAPES[device.scale]:
        for dtype in (torch.float32, torch.bfloat16):
            with record.attempt(f"{shape} {dtype}"):
                rows += _rows(device, shape, dtype)
                record.add(TITLE, ["shape", "dtype", "operation", "choice"], rows)


def _rows(device: Device, shape: Shape, dtype: torch.dtype) -> list[Row]:
    with device.default():
        problem = Problem(shape, dtype)
    gradients = problem.prepare_backward(lambda *given: wkv(*given, backend="cuda"))

    def forced(operation: str, choices: Choices) -> Callable[[], object]:
        def call() -> object:
            with forced_plan(**choices):
                if operation == "backward":
                    return gradients()
                return problem.forward(lambda *given: wkv(*given, backend="cuda"))

        return call

    rows: list[Row] = []
    for operation in TENSORS:
        choices = {_written(choice): choice for choice in CHOICES[operation]}
        seconds = device.alternate({name: forced(operation, choice) for name, choice in choices.items()})
        fastest = min(statistics.median(samples) for samples in seconds.values())
        rows += [
            {
                "shape": written(shape),
                "dtype": name_of(dtype),
                "operation": operation,
                "choice": name,
                **timed(samples, "µs"),
                "of the fastest": statistics.median(samples) / fastest,
                "_plan": plan_here(operation, dtype, *shape, **choices[name]),
            }
            for name, samples in seconds.items()
        ]
    return rows


def _written(choices: Choices) -> str:
    return ", ".join(f"{name} {choice}" for name, choice in choices.items()) or "the planner's"
