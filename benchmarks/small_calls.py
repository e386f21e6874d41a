"""Small calls of whichever rwkv_kernels this process imports, on one CPU: the program that benchmarks/beside.py starts.

It imports torch and the package alone, and only names that every version of it has, so that another tree can run it.
Prints the seconds of the import, then for each line that it reads a line of the seconds of every call.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

started = time.perf_counter()
import rwkv_kernels  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started

C = 768  # of a step
BATCHES = 5  # of which the fastest counts: whatever else the machine does only adds


def calls() -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, requires_grad: bool = False) -> Tensor:
        return torch.randn(shape, generator=draw).requires_grad_(requires_grad)

    w, u, kt, vt = normal(C), normal(C), normal(64, C), normal(64, C)
    state = rwkv_kernels.empty_state(64, C)
    short = [normal(*shape, requires_grad=True) for shape in [(64,), (64,), (1, 16, 64), (1, 16, 64)]]
    plain = [x.detach() for x in short]
    gy, short_state = torch.ones(1, 16, 64), rwkv_kernels.empty_state(1, 64)
    token = [*plain[:2], plain[2][:, 0], plain[3][:, 0]]
    forward, step = torch.ops.rwkv_kernels.wkv_forward.default, torch.ops.rwkv_kernels.wkv_step.default

    def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                function()

        return call

    def stepping(B: int, r: Tensor | None) -> Callable[[], object]:
        given = w, u, kt[:B], vt[:B], state[:B]
        return lambda: rwkv_kernels.wkv_step(*given, r=r)

    measured = {
        **{f"wkv_step at ({B}, {C})": stepping(B, None) for B in (1, 8, 64)},
        f"wkv_step with r at (1, {C})": stepping(1, vt[:1]),
        "wkv at (1, 16, 64)": lambda: rwkv_kernels.wkv(*plain),
        "wkv with a state at (1, 16, 64)": lambda: rwkv_kernels.wkv(*plain, short_state, return_state=True),
        "torch.ops: wkv_forward at (1, 16, 64)": lambda: forward(*plain, None, False),
        "torch.ops: wkv_step at (1, 64)": lambda: step(*token, short_state),
    }
    return {name: without_gradients(function) for name, function in measured.items()} | {
        "wkv and its gradients at (1, 16, 64)": lambda: torch.autograd.grad(rwkv_kernels.wkv(*short), short, gy)
    }


def least_seconds(call: Callable[[], object], repetitions: int) -> float:
    """Of one call, in the fastest of a few batches."""
    seconds = []
    for _ in range(BATCHES):
        started = time.perf_counter()
        for _ in range(repetitions):
            call()
        seconds.append(time.perf_counter() - started)
    return min(seconds) / repetitions


def main() -> None:
    """Answers every line of standard input: how many calls a batch has, after which they are timed."""
    torch.set_num_threads(1)  # a second thread would be waited for, at the mercy of what else the machine does
    measured = calls()
    for call in measured.values():
        for _ in range(20):
            call()
    print(json.dumps({"where": rwkv_kernels.__file__, "seconds": IMPORT_SECONDS}), flush=True)
    for line in sys.stdin:
        print(json.dumps({name: least_seconds(call, int(line)) for name, call in measured.items()}), flush=True)


if __name__ == "__main__":
    main()
