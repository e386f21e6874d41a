"""What one small call costs: the launch itself, and a decoding step, eager and in a graph."""

from typing import Any

import torch
import torch.utils.benchmark

import rwkv_kernels
from benchmarks import harness
from benchmarks.gpu.operations import backends
from benchmarks.gpu.timing import Call, Device

TITLE = "Latency"

C = 768
CALLS_IN_A_GRAPH = 100


def run(device: Device) -> list[harness.Row]:
    """Microseconds per call: the time between calls that follow each other, eager; the kernel's own, in a graph."""
    one = torch.zeros(1)
    calls: dict[str, Call] = {"torch: one.add_(1), next to an empty kernel": lambda: one.add_(1)}
    for backend in backends(device):
        for B in (1, 8, 64):
            arguments = _arguments(B)
            calls[f"{backend}: wkv_step at ({B}, {C})"] = _step(arguments, backend)
        w, u, k, v, state = _arguments(1)
        calls[f"{backend}: wkv at (1, 1, {C})"] = lambda given=(w, u, k[:, None], v[:, None], state), name=backend: (
            rwkv_kernels.wkv(*given, backend=name)
        )
    return [_row(device, what, call) for what, call in calls.items()]


def _arguments(B: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(C), torch.randn(C), torch.randn(B, C), torch.randn(B, C), rwkv_kernels.empty_state(B, C)


def _step(arguments: tuple[Any, ...], backend: str) -> Call:
    return lambda: rwkv_kernels.wkv_step(*arguments, backend=backend)


def _row(device: Device, what: str, call: Call) -> harness.Row:
    timer = torch.utils.benchmark.Timer("call()", globals={"call": call})
    with torch.no_grad():
        eager = timer.blocked_autorange(min_run_time=0.3) if device.is_gpu else timer.timeit(10)
        row: harness.Row = {"what": what, "eager µs": eager.median * 1e6, "_eager_seconds": eager.times}
        if device.is_gpu:
            seconds = _seconds_in_a_graph(device, call)
            row |= {"in a graph µs": harness.quartiles(seconds)[1] * 1e6, "_graph_seconds": seconds}
    return row


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
