"""Hardware counters of forward, backward and a step: time, traffic, and the limits of the kernels.

Under Nsight Compute (ncu), which runs every kernel several times, with its caches empty and its clock as it is.
"""

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import CANNOT_RUN, ROOT
from benchmarks.device import Device, backends
from benchmarks.problem import Problem, Shape, function_of
from benchmarks.records import Record, Row
from rwkv_kernels import empty_state, wkv_step

TITLE = "Counters of every kernel, in the order of the cases: forward with checkpoints, backward, a step with r"
CASES: dict[str, list[tuple[Shape, torch.dtype]]] = {
    "cuda": [
        ((8, 1024, 768), torch.bfloat16),
        ((8, 1024, 768), torch.float32),
        ((1, 65536, 2560), torch.bfloat16),
        ((8, 4096, 4096), torch.bfloat16),
    ],
    "smoke": [((2, 130, 64), torch.float32)],
}
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, %",
    "sm__inst_executed.sum": "warp instructions",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
    "launch__waves_per_multiprocessor": "waves",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled on memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled on a barrier",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "stalled on arithmetic",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
}
NO_PERMISSION = "ERR_NVGPUCTRPERM"
# As in csrc/gpu/kernels.def, and the type of the elements.
OURS = re.compile(r"wkv_kernel<(?:wkv::)?(Forward|Backward|Reduce|Step)<(?:wkv::)?(\w+)>")


def run(device: Device, record: Record) -> None:
    """A row for every kernel that the cases launch; ends the process with CANNOT_RUN where ncu cannot count."""
    ncu = _program()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--csv", "--log-file", str(log), "--print-units", "base", "--metrics", ",".join(METRICS)]
        options += ["--profile-from-start", "off", "--clock-control", "none"]
        result = subprocess.run([ncu, *options, sys.executable, "-m", "benchmarks.counters", device.scale], cwd=ROOT)
        text = log.read_text() if log.exists() else ""
    record.add(TITLE, ["launch"], list(read(text.splitlines())))
    if NO_PERMISSION in text:
        _give_up(f"ncu may not read counters here: {NO_PERMISSION}")
    if result.returncode != 0:
        raise RuntimeError(f"ncu ended with {result.returncode}: {text[-500:]}")


def read(lines: Iterable[str]) -> Iterable[Row]:
    """A row for every kernel of ncu's table, which has a line for every metric of each, among other lines."""
    rows: dict[str, Row] = {}
    for line in csv.DictReader(line for line in lines if line.startswith('"')):
        where = {"launch": line["ID"], "kernel": _name(line["Kernel Name"])}
        where |= {"grid": line["Grid Size"], "block": line["Block Size"]}
        row = rows.setdefault(line["ID"], where)
        name, unit, value = METRICS[line["Metric Name"]], line["Metric Unit"], line["Metric Value"].replace(",", "")
        row[f"{name}, {unit}" if name in ("time", "read", "written") else name] = _number(value)
    return rows.values()


def _name(kernel: str) -> str:
    ours = OURS.search(kernel)
    return f"{ours[1].lower()} {ours[2].lower()}" if ours else kernel


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # such as "n/a"


def _program() -> str:
    sys.path.insert(0, str(ROOT / "tools"))
    import cuda_toolkit

    return cuda_toolkit.find_program("ncu") or _give_up("there is no ncu, neither on the PATH nor in the CUDA toolkit")


def _give_up(why: str) -> str:
    print(why, flush=True)
    sys.exit(CANNOT_RUN)


def launch_all(scale: str) -> None:
    """Runs every case once to warm up, and once within the profiler's range."""
    device = Device("cpu" if scale == "smoke" else "cuda", scale == "smoke")
    for shape, dtype in CASES[scale]:
        for backend in backends(device):
            with device.default():
                problem = Problem(shape, dtype)
                state = empty_state(shape[0], shape[2])
            function, (w, u, k, v) = function_of(backend), (x.detach() for x in problem.leaves)
            for counted in (False, True):
                if counted and device.is_gpu:
                    torch.cuda.profiler.start()
                problem.forward_and_backward(function)
                wkv_step(w, u, k[:, 0], v[:, 0], state, r=k[:, 0], backend=backend)
                device.synchronize()
                if counted and device.is_gpu:
                    torch.cuda.profiler.stop()


if __name__ == "__main__":
    launch_all(sys.argv[1])
