"""What a call costs besides the work: importing the package, and one eager call of one token."""

import statistics
import subprocess
import sys

import torch
import torch.utils.benchmark

import rwkv_kernels
from benchmarks import harness

TITLE = "Overhead"

IMPORT = """
import time, torch
start = time.perf_counter()
import rwkv_kernels
print(time.perf_counter() - start)
"""


def run(smoke: bool) -> list[harness.Row]:
    """Milliseconds of `import rwkv_kernels` after `import torch`, microseconds of calls at (1, 1, 768)."""
    repeats = 2 if smoke else 9
    imports = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    C = 768
    names = {
        "w": torch.randn(C),
        "u": torch.randn(C),
        "k": torch.randn(1, 1, C),
        "kt": torch.randn(1, C),
        "state": rwkv_kernels.empty_state(1, C),
        "wkv": rwkv_kernels.wkv,
        "wkv_step": rwkv_kernels.wkv_step,
        "kernel": torch.ops.rwkv_kernels.wkv_forward.default,
        "below_autograd": torch._C._AutoDispatchBelowAutograd,
    }
    rows: list[harness.Row] = [
        {"what": "import rwkv_kernels after torch", "time": statistics.median(imports) * 1e3, "unit": "ms"}
    ]
    for what, statement in [
        ("the operator's kernel alone at (1, 1, 768)", "kernel(w, u, k, k, None, False)"),
        ("wkv at (1, 1, 768), no_grad", "wkv(w, u, k, k)"),
        ("wkv with a state at (1, 1, 768), no_grad", "wkv(w, u, k, k, state)"),
        ("wkv_step at (1, 768), no_grad", "wkv_step(w, u, kt, kt, state)"),
    ]:
        timer = torch.utils.benchmark.Timer(statement, globals=names, num_threads=torch.get_num_threads())
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd() if "kernel" in what else torch.no_grad():
            measured = timer.timeit(10) if smoke else timer.blocked_autorange(min_run_time=1)
        rows.append({"what": what, "time": measured.median * 1e6, "unit": "µs"})
    return rows
