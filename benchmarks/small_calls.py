"""Small calls of the rwkv_kernels that this process imports, for both tables of benchmarks/latency.py.

It is also a program that runs with the package of any tree: it imports only torch and the package, and uses names
that every version has. It prints the package's path and the seconds of its import; then for each line that it
reads, a number of repetitions, it prints the seconds of every call. Its argument is the type of a device.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

started = time.perf_counter()
import rwkv_kernels  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started

Calls = dict[str, Callable[[], object]]

C = 768
BATCHES = 5  # the fastest counts: other work of the machine only adds


def calls(device: str, backend: str = "auto") -> Calls:
    """Calls without gradients, by name: the same inputs each time."""
    torch.manual_seed(0)
    with torch.device(device):
        w, u, kt, vt, state = *torch.randn(2, C), *torch.randn(2, 64, C), rwkv_kernels.empty_state(64, C)
        k, v = kt[:1, None], vt[:1, None]
        longer = torch.randn(2, 1, 64, C)

    def step(B: int, r: Tensor | None) -> Callable[[], object]:
        given = (w, u, kt[:B], vt[:B], state[:B])
        return lambda: rwkv_kernels.wkv_step(*given, r=r, backend=backend)

    def sequence(*inputs: Tensor) -> Callable[[], object]:
        return lambda: rwkv_kernels.wkv(*inputs, backend=backend)

    return {
        f"wkv_step at (1, {C})": step(1, None),
        **{f"wkv_step with r at ({B}, {C})": step(B, vt[:B]) for B in (1, 8, 64)},
        f"wkv at (1, 1, {C})": sequence(w, u, k, v),
        f"wkv with a state at (1, 1, {C})": sequence(w, u, k, v, state[:1]),
        f"wkv at (1, 64, {C})": sequence(w, u, *longer),
        f"wkv at (1, 64, {C}), bfloat16": sequence(w, u, *longer.bfloat16()),
    }


def gradient_calls(device: str, backend: str = "auto") -> Calls:
    """Forward and the gradients of w, u, k and v, by name: the same inputs each time."""
    found: Calls = {}
    for T, channels, dtype in [(16, 64, torch.float32), (64, C, torch.float32), (64, C, torch.bfloat16)]:
        torch.manual_seed(0)
        with torch.device(device):
            w, u = torch.randn(2, channels)
            k, v, gy = torch.randn(3, 1, T, channels, dtype=dtype)
        leaves = [x.requires_grad_() for x in (w, u, k, v)]

        def call(leaves: list[Tensor] = leaves, gy: Tensor = gy) -> object:
            return torch.autograd.grad(rwkv_kernels.wkv(*leaves, backend=backend), leaves, gy)

        found[f"wkv and its gradients at (1, {T}, {channels}){', bfloat16' * (dtype is torch.bfloat16)}"] = call
    return found


def operator_calls(device: str) -> Calls:
    """The operators of torch.ops, without the package's own Python."""
    torch.manual_seed(0)
    with torch.device(device):
        w, u, k, v, state = *torch.randn(2, C), *torch.randn(2, 1, C), rwkv_kernels.empty_state(1, C)
    sequence = (w, u, k[:, None], v[:, None], None, False)
    forward, step = torch.ops.rwkv_kernels.wkv_forward.default, torch.ops.rwkv_kernels.wkv_step.default
    return {
        f"torch.ops: wkv_forward at (1, 1, {C})": lambda: forward(*sequence),
        f"torch.ops: wkv_step at (1, {C})": lambda: step(w, u, k, v, state),
    }


def check(device: str, backend: str = "auto") -> None:
    """Raises AssertionError where a call's results differ from the oracle's."""
    for kind in (calls, gradient_calls):
        for (name, call), exact in zip(kind(device, backend).items(), kind(device, "reference").values(), strict=True):
            torch.testing.assert_close(
                call(), exact(), rtol=1e-2, atol=1e-3, msg=lambda why, name=name: f"{name}: {why}"
            )


def timers(measured: Calls, threads: int = 1) -> dict[str, Timer]:
    """A timer of each call, by its name; with one thread none waits for another on a busy machine."""
    return {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in measured.items()}


def seconds(timers: dict[str, Timer], repetitions: int, batches: int = 1) -> dict[str, float]:
    """Seconds of each call, the mean of the repetitions in the fastest batch."""
    return {name: min(timer.timeit(repetitions).mean for _ in range(batches)) for name, timer in timers.items()}


def main(device: str) -> None:
    """Answers every line of standard input."""
    print(json.dumps({"where": rwkv_kernels.__file__, "seconds": IMPORT_SECONDS}), flush=True)
    check(device)
    forward, training = timers(calls(device) | operator_calls(device)), timers(gradient_calls(device))
    for line in sys.stdin:
        with torch.no_grad():
            found = seconds(forward, int(line), BATCHES)
        print(json.dumps(found | seconds(training, int(line), BATCHES)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
