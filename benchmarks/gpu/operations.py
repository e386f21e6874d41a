"""Forward and backward of every backend and schedule: time, memory, and bandwidth as a part of a copy's."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import rwkv_kernels
from benchmarks import harness
from benchmarks.gpu.problem import Function, Problem, Shape
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import Device
from benchmarks.plans import SCHEDULES, forced_plan
from rwkv_kernels._extension import extension

TITLE = "Operations: minimal bytes (3 tensors forward, 5 backward) over time, against a copy of 1 GiB"

SHAPES: list[Shape] = [
    (8, 1024, 768),
    (32, 1024, 2048),
    (1, 4096, 768),
    (1, 65536, 2560),
    (8, 4096, 4096),
    (1, 16384, 768),
    (64, 512, 1024),
    (1, 128, 768),
    (8, 1, 768),
]
SMOKE_SHAPES: list[Shape] = [(2, 130, 64), (2, 1, 64)]
DTYPES = (torch.float32, torch.bfloat16)
TENSORS = {"forward": 3, "backward": 5}


def backends(device: Device) -> list[str]:
    """The compiled backends that run on the device."""
    return [
        name
        for name, available, _ in rwkv_kernels.backends()
        if available and name != "reference" and (name != "cpu") == device.is_gpu
    ]


def schedules(backend: str) -> list[str | None]:
    return [None, *SCHEDULES] if backend == "cuda" else [None]


def function_of(backend: str, schedule: str | None) -> Function:
    def function(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with forced_plan(schedule=schedule):
            return rwkv_kernels.wkv(w, u, k, v, backend=backend)

    return function


def calls_of(problem: Problem, backend: str, schedule: str | None) -> dict[str, Callable[[], object]]:
    """Forward and backward, each to be timed by itself."""
    function = function_of(backend, schedule)
    gradients = problem.prepare_backward(function)

    def backward() -> object:
        with forced_plan(schedule=schedule):
            return gradients()

    return {"forward": lambda: problem.forward(function), "backward": backward}


def planned(backend: str, operation: str, dtype: torch.dtype, shape: Shape, schedule: str | None) -> dict[str, object]:
    """The plan as the planner tells it, nothing for a backend without one."""
    if backend != "cuda":
        return {}
    name = str(dtype).removeprefix("torch.")
    return dict(extension.module.plan_cuda(operation, name, *shape, limits=0, schedule=schedule))


def run(device: Device, report: Report, bandwidth: float) -> list[harness.Row]:
    rows = []
    for shape in SHAPES if device.is_gpu else SMOKE_SHAPES:
        for dtype in DTYPES:
            with report.attempt(f"{shape} {dtype}"):
                rows += _rows(device, shape, dtype, bandwidth)
    return rows


def _rows(device: Device, shape: Shape, dtype: torch.dtype, bandwidth: float) -> list[harness.Row]:
    problem = Problem(shape, dtype)
    variants = [(backend, schedule) for backend in backends(device) for schedule in schedules(backend)]
    errors = {variant: problem.check(function_of(*variant)) for variant in variants}
    prepared = {variant: calls_of(problem, *variant) for variant in variants}
    extra = {variant: _extra_bytes(device, problem, function_of(*variant)) for variant in variants}
    rows: list[harness.Row] = []
    for operation, tensors in TENSORS.items():
        calls = {str(variant): prepared[variant][operation] for variant in variants}
        for variant, samples in zip(variants, device.alternate(calls).values(), strict=True):
            backend, schedule = variant
            achieved = tensors * problem.bytes / statistics.median(samples)
            rows.append(
                {
                    "shape": ", ".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "operation": operation,
                    "backend": backend,
                    "schedule": schedule or "auto",
                    "ms": statistics.median(samples) * 1e3,
                    "spread": harness.spread(samples),
                    "GB/s": achieved / 1e9,
                    "of copy": achieved / bandwidth,
                    "extra MB": "-" if extra[variant] is None else extra[variant][operation] / 1e6,
                    "error": errors[variant],
                    "_seconds": samples,
                    "_plan": planned(backend, operation, dtype, shape, schedule),
                }
            )
    return rows


def _extra_bytes(device: Device, problem: Problem, function: Function) -> dict[str, int] | None:
    """Memory beyond inputs, outputs and gradients: of forward alone, and of forward and backward together."""
    forward = device.peak_bytes(lambda: problem.forward(function))
    both = device.peak_bytes(lambda: problem.forward_and_backward(function))
    if forward is None or both is None:
        return None
    return {"forward": forward - problem.bytes, "backward": both - 3 * problem.bytes}
