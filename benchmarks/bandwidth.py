"""The operator against the memory: its minimal traffic over its time, as a part of a triad's bandwidth."""

import torch

import rwkv_kernels  # noqa: F401 - registers the operators
from benchmarks import harness

TITLE = "Bandwidth: minimal bytes (3 tensors forward, 5 backward) over time, against a triad in the same run"

SHAPES = [(8, 1024, 768), (1, 16384, 768)]

# Sets of tensors are used in turn, so that none is in the cache when its turn comes.
BYTES_IN_ROTATION = 256 * 2**20

# Every shape and dtype is measured in several rounds, because a shared machine's clock changes from second to second.
ROUNDS = 8


def run(smoke: bool) -> list[harness.Row]:
    """Rows for every shape and dtype: milliseconds, GB/s and the part of the triad's bandwidth."""
    harness.keep_freed_memory()
    shapes = [(2, 64, 32)] if smoke else SHAPES
    cases = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    rounds = [[_seconds(*case, runs=2)] for case in cases] if smoke else _rounds(cases)
    return [row for case, measured in zip(cases, rounds, strict=True) for row in _rows(*case, measured)]


Case = tuple[tuple[int, int, int], torch.dtype]
Seconds = dict[str, list[float]]


def _rounds(cases: list[Case]) -> list[list[Seconds]]:
    rounds = [[_seconds(*case, runs=harness.RUNS) for case in cases] for _ in range(ROUNDS)]
    return [list(measured) for measured in zip(*rounds, strict=True)]


def _seconds(shape: tuple[int, int, int], dtype: torch.dtype, runs: int) -> Seconds:
    B, T, C = shape
    tensor_bytes = B * T * C * dtype.itemsize
    sets = max(1, min(8, BYTES_IN_ROTATION // (3 * tensor_bytes)))
    w, u = torch.randn(C) - 1, torch.randn(C) * 0.3
    keys, values, gradients, targets = ([torch.randn(shape).to(dtype) for _ in range(sets)] for _ in range(4))
    forward, backward = torch.ops.rwkv_kernels.wkv_forward.default, torch.ops.rwkv_kernels._wkv_backward.default
    with torch.no_grad():
        saved = [forward(w, u, k, v, None, True)[2] for k, v in zip(keys, values, strict=True)]

        def triad(run: int) -> object:
            i = run % sets
            return torch.add(keys[i], values[i], alpha=2.0, out=targets[i])

        def run_forward(run: int) -> object:
            i = run % sets
            return forward(w, u, keys[i], values[i], None, False)

        def run_backward(run: int) -> object:
            i = run % sets
            return backward(w, u, keys[i], values[i], None, saved[i], gradients[i], None)

        return harness.alternate({"triad": triad, "forward": run_forward, "backward": run_backward}, runs)


def _rows(shape: tuple[int, int, int], dtype: torch.dtype, rounds: list[Seconds]) -> list[harness.Row]:
    B, T, C = shape
    tensor_bytes = B * T * C * dtype.itemsize
    seconds = {name: [sample for measured in rounds for sample in measured[name]] for name in rounds[0]}
    tensors = {"triad": 3, "forward": 3, "backward": 5}
    bandwidth = {name: tensors[name] * tensor_bytes / harness.quartiles(s)[1] for name, s in seconds.items()}
    return [
        {
            "shape": f"{B}, {T}, {C}",
            "dtype": str(dtype).removeprefix("torch."),
            "operation": name,
            "ms": harness.quartiles(samples)[1] * 1e3,
            "spread": harness.spread(samples),
            "GB/s": bandwidth[name] / 1e9,
            "of triad": bandwidth[name] / bandwidth["triad"],
            "_seconds": samples,
        }
        for name, samples in seconds.items()
    ]
