"""Memory of forward and backward beyond inputs, outputs and gradients, as the system counts it."""

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import harness

TITLE = "Peak memory beyond inputs, outputs and gradients"

SHAPES = [(8, 2048, 768), (1, 16384, 768)]


def run(smoke: bool) -> list[harness.Row]:
    """Extra bytes per element of k, each measured in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        print("this system does not tell a process's peak memory")
        return []
    shapes = [(2, 256, 64)] if smoke else SHAPES
    rows = []
    for B, T, C in shapes:
        for dtype in ("float32", "bfloat16", "float64"):
            command = [sys.executable, "-m", "benchmarks.memory", str(B), str(T), str(C), dtype]
            extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            elements = B * T * C
            rows.append(
                {"shape": f"{B}, {T}, {C}", "dtype": dtype, "extra MB": extra / 1e6, "bytes/element": extra / elements}
            )
    return rows


def _peak() -> int:
    """The most memory that this process has held, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _extra_bytes(B: int, T: int, C: int, dtype: torch.dtype) -> int:
    import rwkv_kernels  # noqa: F401 - registers the operators

    forward, backward = torch.ops.rwkv_kernels.wkv_forward.default, torch.ops.rwkv_kernels._wkv_backward.default

    def inputs(T: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full(shape, 0.5, dtype=dtype) for shape in [(B, T, C)] * 3)

    def run(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gy: torch.Tensor) -> object:
        y, _, checkpoints = forward(w, u, k, v, None, True)
        return y, backward(w, u, k, v, None, checkpoints, gy, None)

    w, u = torch.zeros(C), torch.zeros(C)
    run(w, u, *inputs(128))  # threads and code are there from now on
    k, v, gy = inputs(T)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _peak()
    results = run(w, u, k, v, gy)
    outputs = 3 * k.numel() * k.element_size()  # y, gk, gv
    extra = _peak() - before - outputs
    del results
    return extra


if __name__ == "__main__":
    *sizes, name = sys.argv[1:]
    print(_extra_bytes(*map(int, sizes), getattr(torch, name)))  # type: ignore[arg-type]
