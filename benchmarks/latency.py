"""The cost of a call besides its work: importing the package, a launch, a decoding step, and gradients.

Gradients are measured beside the minimum for a differentiable operator of torch: an autograd.Function that
calls the same two kernels and checks nothing.

`--beside TREE` measures small calls of this tree and of another one, in processes that take turns. On a machine with
other work, two runs after each other differ by more than the cost of a call does. Here each round times the same calls
in both trees within a fraction of a second, and the difference is taken within the round. Several pairs of processes
are started: the placement of a process's memory makes a difference, which more rounds do not average out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT, small_calls
from benchmarks.device import Call, Device, backends, quartiles, timed
from benchmarks.records import Record, Row
from rwkv_kernels import wkv

TITLE = "Latency: the time between eager calls that follow each other; the kernel's own, in a graph"
GRADIENTS = "Latency of gradients: one thread, float32, (1, 4, 64), eager calls that follow each other"
BESIDE = "Latency beside {tree}: medians over the rounds; differences are taken within a round"
IMPORT = "import rwkv_kernels after torch"
NEXT_TO_NOTHING = "torch: one.add_(1), next to an empty kernel"

ROUNDS, REPETITIONS = 25, 100  # of the tables of this tree
PAIRS, ROUNDS_OF_A_PAIR, REPETITIONS_OF_A_PAIR = 8, 12, 60
CALLS_IN_A_GRAPH = 100


def run(device: Device, record: Record, other_tree: Path | None = None) -> None:
    """Microseconds per call."""
    if other_tree is not None:
        _run_beside(device, record, other_tree.resolve())
        return
    rows = [_import_row(device)]
    one = torch.zeros(1, device=device.type)
    rows += _rows(device, {NEXT_TO_NOTHING: lambda: one.add_(1)})
    for backend in backends(device):
        with record.attempt(backend):
            small_calls.check(device.type, backend)
            calls = small_calls.calls(device.type, backend)
            rows += _rows(device, {f"{backend}: {name}": call for name, call in calls.items()})
            record.add(TITLE, ["what", "way"], rows)
    rows = []
    for backend in backends(device):
        with record.attempt(f"{backend}: gradients"):
            rows += _gradient_rows(device, backend)
            record.add(GRADIENTS, ["backend", "what", "way"], rows)


def _samples(device: Device, calls: dict[Any, Call], threads: int = 1) -> dict[Any, list[float]]:
    """Seconds of each call, which take turns."""
    rounds, repetitions = (2, 2) if device.smoke else (ROUNDS, REPETITIONS)
    timers = small_calls.timers(calls, threads)
    found = [small_calls.seconds(timers, repetitions) for _ in range(rounds)]
    return {name: [seconds[name] for seconds in found] for name in calls}


@torch.no_grad()
def _rows(device: Device, calls: dict[str, Call]) -> Iterator[Row]:
    for what, seconds in _samples(device, calls, torch.get_num_threads()).items():
        yield {"what": what, "way": "eager", **timed(seconds, "µs")}
        if device.is_gpu:
            yield {"what": what, "way": "in a graph", **timed(_seconds_in_a_graph(device, calls[what]), "µs")}


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


# ---- gradients ----


class _Plain(torch.autograd.Function):
    """The operators of torch.ops.rwkv_kernels, without state, checks, or a choice of backend."""

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
    """Calls on torch's default device, by name and whether forward alone or with backward."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in [(64,), (64,), (1, 4, 64), (1, 4, 64)]]
    _, _, k, v = inputs
    gy = torch.ones_like(k)
    forwards: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: _Plain.apply(*inputs),
        "wkv": lambda: wkv(*inputs, backend=backend),
        "torch.softmax of k": lambda: k.softmax(-1),
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(k, k, v),
    }
    if not torch._C._dispatch_has_kernel_for_dispatch_key("rwkv_kernels::wkv_forward", k.device.type.upper()):
        del forwards[PLAIN]  # such a device has other backends

    def with_backward(forward: Callable[[], Any]) -> Call:
        return lambda: torch.autograd.grad(forward(), inputs, gy, allow_unused=True)

    return {(what, "forward"): forward for what, forward in forwards.items()} | {
        (what, "forward and backward"): with_backward(forward) for what, forward in forwards.items()
    }


def _gradient_rows(device: Device, backend: str) -> Iterator[Row]:
    with device.default():
        calls = gradient_calls(backend)
    seconds = _samples(device, calls)
    for (what, way), samples in seconds.items():
        row: Row = {"backend": backend, "what": what, "way": way, **timed(samples, "µs")}
        if (PLAIN, way) in seconds:
            row["of plain"] = row["µs"] / timed(seconds[PLAIN, way], "µs")["µs"]
        yield row


# ---- this tree beside another one ----


def _run_beside(device: Device, record: Record, tree: Path) -> None:
    sizes = (1, 2, 2) if device.smoke else (PAIRS, ROUNDS_OF_A_PAIR, REPETITIONS_OF_A_PAIR)
    number_of_pairs, rounds, repetitions = sizes
    trees = [("here", ROOT), ("there", tree)]
    pairs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(number_of_pairs):
        with ExitStack() as stack:
            children = {side: stack.enter_context(_started(folder, device)) for side, folder in trees}
            answers = [{side: {IMPORT: _import_seconds(children[side], folder)} for side, folder in trees}]
            answers += [{side: _asked(children[side], repetitions) for side, _ in trees} for _ in range(rounds)]
        trees.reverse()  # so that the first place alternates
        for answer in answers:
            for name, seconds in answer["here"].items():
                pairs.setdefault(name, []).append((seconds, answer["there"][name]))
        record.add(BESIDE.format(tree=tree.name), ["call"], [_pair_row(name, found) for name, found in pairs.items()])


def _pair_row(name: str, pairs: list[tuple[float, float]]) -> Row:
    here, there = ([1e6 * pair[side] for pair in pairs] for side in (0, 1))
    low, middle, high = quartiles([a - b for a, b in zip(here, there, strict=True)])
    (_, median_here, _), (_, median_there, _) = quartiles(here), quartiles(there)
    return {
        "call": name,
        "here, µs": median_here,
        "there, µs": median_there,
        "difference, µs": f"{middle:+.2f}",
        "its quartiles": f"{low:+.2f} to {high:+.2f}",
        "least here, µs": min(here),
        "least there, µs": min(there),
        "rounds": len(pairs),
        "spread": (high - low) / median_there,
        "_seconds": [float(f"{pair[0]:.4g}") for pair in pairs],
        "_seconds_there": [float(f"{pair[1]:.4g}") for pair in pairs],
    }


# ---- processes of small_calls.py ----

Process = subprocess.Popen[str]


@contextmanager
def _started(folder: Path, device: Device) -> Iterator[Process]:
    """A process of the program with the package of a tree, ended with the block."""
    # As text, so that the folder of this module is not on the path.
    command = [sys.executable, "-c", Path(small_calls.__file__).read_text(), device.type]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _import_seconds(process: Process, folder: Path) -> float:
    answer = _answer(process)
    if not Path(answer["where"]).resolve().is_relative_to(folder):
        raise RuntimeError(f"{folder} has no package of its own: {answer['where']} was imported")
    return float(answer["seconds"])


def _asked(process: Process, repetitions: int) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write(f"{repetitions}\n")
    process.stdin.flush()
    return _answer(process)  # type: ignore[no-any-return]


def _answer(process: Process) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process of benchmarks/small_calls.py has ended")
    return json.loads(line)


def _import_row(device: Device) -> Row:
    samples = []
    for _ in range(2 if device.smoke else 5):
        with _started(ROOT, device) as process:
            samples.append(_import_seconds(process, ROOT))
    return {"what": IMPORT, "way": "once", **timed(samples, "µs")}
