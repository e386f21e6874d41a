"""What a call costs besides the work: importing the package, a launch, a decoding step, and gradients.

Gradients are measured beside the least that a differentiable operator of torch can cost: an autograd.Function that
calls the same two kernels and checks nothing. `--beside TREE` measures small calls of this tree and another instead.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.benchmark
from torch import Tensor

from benchmarks import beside
from benchmarks.device import Call, Device, timed
from benchmarks.op import backends
from benchmarks.records import Record, Row
from rwkv_kernels import empty_state, wkv, wkv_step

TITLE = "Latency: the time between eager calls that follow each other; the kernel's own, in a graph"
GRADIENTS = "Latency of gradients: one thread, float32, (1, 4, 64), eager calls that follow each other"
IMPORT = """
import time, torch
start = time.perf_counter()
import rwkv_kernels
print(time.perf_counter() - start)
"""

C = 768
CALLS_IN_A_GRAPH = 100


def run(device: Device, record: Record, other_tree: Path | None = None) -> None:
    """Microseconds per call."""
    if other_tree is not None:
        beside.run(device, record, other_tree)
        return
    one = torch.zeros(1, device=device.type)
    calls: dict[str, Call] = {"torch: one.add_(1), next to an empty kernel": lambda: one.add_(1)}
    for backend in backends(device):
        with device.default():
            calls |= _calls(backend)
    rows = [_import_row(device)]
    for what, call in calls.items():
        with record.attempt(what), torch.no_grad():
            rows += _rows(device, what, call)
            record.add(TITLE, ["what", "way"], rows)
    rows = []
    for backend in backends(device):
        with record.attempt(f"{backend}: gradients"), device.default():
            rows += _gradient_rows(device, backend)
            record.add(GRADIENTS, ["backend", "what", "way"], rows)


def _import_row(device: Device) -> Row:
    seconds = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)
        for _ in range(2 if device.smoke else 5)
    ]
    return {"what": "import rwkv_kernels after torch", "way": "once", **timed(seconds, "µs")}


def _calls(backend: str) -> dict[str, Call]:
    w, u, kt, vt, state = torch.randn(C), torch.randn(C), torch.randn(64, C), torch.randn(64, C), empty_state(64, C)
    k, v = kt[:1, None], vt[:1, None]

    def step(B: int) -> Call:
        given = (w, u, kt[:B], vt[:B], state[:B])
        return lambda: wkv_step(*given, r=vt[:B], backend=backend)

    return {
        **{f"{backend}: wkv_step with r at ({B}, {C})": step(B) for B in (1, 8, 64)},
        f"{backend}: wkv at (1, 1, {C})": lambda: wkv(w, u, k, v, backend=backend),
        f"{backend}: wkv with a state at (1, 1, {C})": lambda: wkv(w, u, k, v, state[:1], backend=backend),
    }


def _rows(device: Device, what: str, call: Call) -> list[Row]:
    timer = torch.utils.benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    eager = timer.timeit(10) if device.smoke else timer.blocked_autorange(min_run_time=0.3)
    rows: list[Row] = [{"what": what, "way": "eager", **timed(eager.times, "µs")}]
    if device.is_gpu:
        rows.append({"what": what, "way": "in a graph", **timed(_seconds_in_a_graph(device, call), "µs")})
    return rows


def _seconds_in_a_graph(device: Device, call: Call) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_A_GRAPH):
            call()
    return [sample / CALLS_IN_A_GRAPH for sample in device.alternate({"graph": graph.replay})["graph"]]


class _Plain(torch.autograd.Function):
    """The operators of the backends cpu and cuda, without state, checks, or a choice of backend."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, _, checkpoints = torch.ops.rwkv_kernels.wkv_forward.default(*inputs, None, True)
        ctx.save_for_backward(*inputs, checkpoints)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        *inputs, checkpoints = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            gradients = torch.ops.rwkv_kernels._wkv_backward.default(*inputs, None, checkpoints, gy, None)
        return gradients[:4]


PLAIN = "plain autograd.Function"


def gradient_calls(backend: str) -> dict[tuple[str, str], Call]:
    """What is measured, and whether forward alone or with backward -> a call."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in [(64,), (64,), (1, 4, 64), (1, 4, 64)]]
    _, _, k, v = inputs
    gy = torch.ones_like(k)
    forwards: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: _Plain.apply(*inputs),
        "wkv": lambda: wkv(*inputs, backend=backend),
        "torch.softmax of k": lambda: k.softmax(-1),
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(k, k, v),
    }
    if backend not in ("cpu", "cuda"):
        del forwards[PLAIN]

    def with_backward(forward: Callable[[], Any]) -> Call:
        return lambda: torch.autograd.grad(forward(), inputs, gy, allow_unused=True)

    return {(what, "forward"): forward for what, forward in forwards.items()} | {
        (what, "forward and backward"): with_backward(forward) for what, forward in forwards.items()
    }


def _gradient_rows(device: Device, backend: str) -> list[Row]:
    """Microseconds of each call, which take turns."""
    rounds, repetitions = (2, 2) if device.smoke else (25, 100)
    timers = {
        key: torch.utils.benchmark.Timer("call()", globals={"call": call})
        for key, call in gradient_calls(backend).items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, timer in timers.items():
            seconds[key].append(timer.timeit(repetitions).mean)
    rows = []
    for (what, way), samples in seconds.items():
        row: Row = {"backend": backend, "what": what, "way": way, **timed(samples, "µs")}
        if (PLAIN, way) in seconds:
            row["of plain"] = row["µs"] / timed(seconds[PLAIN, way], "µs")["µs"]
        rows.append(row)
    return rows
