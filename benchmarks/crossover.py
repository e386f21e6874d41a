"""Where the schedules cross: each by force over a sweep, what was faster, and what the plan would have chosen."""

import statistics

import torch

from benchmarks.device import Device, timed
from benchmarks.op import TENSORS, calls_of, planned, written
from benchmarks.plans import SCHEDULES
from benchmarks.problem import Problem, Shape
from benchmarks.records import Record, Row

TITLE = "Crossover of the schedules, bfloat16: what was faster, what the plan chose, and what that costs"

SWEEPS: dict[str, dict[str, list[Shape]]] = {
    "cuda": {
        "B": [(B, 1024, 768) for B in (1, 2, 4, 8, 16, 32, 64, 128)],
        "C": [(1, 4096, C) for C in (64, 256, 1024, 4096, 8192, 16384, 32768)],
    },
    "smoke": {"B": [(B, 70, 64) for B in (1, 2)]},
}


def run(device: Device, record: Record) -> None:
    """A row for every shape, operation and schedule; "chosen" marks the plan's, "of the fastest" what it costs."""
    rows = []
    for sweep, shapes in SWEEPS[device.scale].items():
        for shape in shapes:
            with record.attempt(f"{shape}"):
                rows += _rows(device, sweep, shape)
                record.add(TITLE, ["sweep", "shape", "operation", "schedule"], rows)


def _rows(device: Device, sweep: str, shape: Shape) -> list[Row]:
    with device.default():
        problem = Problem(shape, torch.bfloat16)
    prepared = {schedule: calls_of(problem, "cuda", schedule) for schedule in SCHEDULES}
    rows: list[Row] = []
    for operation in TENSORS:
        seconds = device.alternate({schedule: calls[operation] for schedule, calls in prepared.items()})
        fastest = min(statistics.median(samples) for samples in seconds.values())
        plan = planned("cuda", operation, torch.bfloat16, shape, None)
        rows += [
            {
                "sweep": sweep,
                "shape": written(shape),
                "operation": operation,
                "schedule": schedule,
                **timed(samples, "µs"),
                "of the fastest": statistics.median(samples) / fastest,
                "chosen": "yes" if schedule == plan["schedule"] else "",
                "_plan": plan,
            }
            for schedule, samples in seconds.items()
        ]
    return rows
