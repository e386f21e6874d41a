"""What a call costs besides the work: importing the package, a launch, a decoding step, eager and in a graph."""

import subprocess
import sys

import torch
import torch.utils.benchmark

from benchmarks.device import Call, Device, timed
from benchmarks.op import backends
from benchmarks.records import Record, Row
from rwkv_kernels import empty_state, wkv, wkv_step

TITLE = "Latency: the time between eager calls that follow each other; the kernel's own, in a graph"
IMPORT = """
import time, torch
start = time.perf_counter()
import rwkv_kernels
print(time.perf_counter() - start)
"""

C = 768
CALLS_IN_A_GRAPH = 100


def run(device: Device, record: Record) -> None:
    """Microseconds per call."""
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
