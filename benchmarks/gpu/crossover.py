"""Where the schedules cross: both by force over a sweep, what was faster, and what the plan would have chosen."""

import statistics

import torch

from benchmarks import harness
from benchmarks.gpu.operations import TENSORS, calls_of, planned
from benchmarks.gpu.problem import Problem, Shape
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import Device
from benchmarks.plans import SCHEDULES

TITLE = "Crossover of the schedules, bfloat16: what was faster, what the plan chose, and what that costs"

SWEEPS: dict[str, list[Shape]] = {
    "B": [(B, 1024, 768) for B in (1, 2, 4, 8, 16, 32, 64, 128)],
    "C": [(1, 4096, C) for C in (64, 256, 1024, 4096, 8192, 16384, 32768)],
}
SMOKE_SWEEPS: dict[str, list[Shape]] = {"B": [(B, 70, 64) for B in (1, 2)]}


def run(device: Device, report: Report) -> list[harness.Row]:
    rows = []
    for sweep, shapes in (SWEEPS if device.is_gpu else SMOKE_SWEEPS).items():
        for shape in shapes:
            with report.attempt(f"{shape}"):
                rows += _rows(device, sweep, shape)
    return rows


def _rows(device: Device, sweep: str, shape: Shape) -> list[harness.Row]:
    problem = Problem(shape, torch.bfloat16)
    prepared = {schedule: calls_of(problem, "cuda", schedule) for schedule in SCHEDULES}
    rows: list[harness.Row] = []
    for operation in TENSORS:
        seconds = device.alternate({schedule: calls[operation] for schedule, calls in prepared.items()}, runs=15)
        medians = {schedule: statistics.median(samples) for schedule, samples in seconds.items()}
        plan = planned("cuda", operation, torch.bfloat16, shape, None)
        chosen = medians[str(plan["schedule"])]
        rows.append(
            {
                "sweep": sweep,
                "shape": ", ".join(map(str, shape)),
                "operation": operation,
                **{f"{schedule}, ms": median * 1e3 for schedule, median in medians.items()},
                "faster": min(medians, key=medians.__getitem__),
                "planned": plan["schedule"],
                "lost": chosen / min(medians.values()) - 1,
                "_seconds": seconds,
                "_plan": plan,
            }
        )
    return rows
