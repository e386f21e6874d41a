"""`make gpu-check`: tests, measures and sanitizes on the GPU that is here, offline, with the python that is here.

Each stage is a separate process: one that crashes or hangs costs the others nothing. The most informative come first,
and one whose limit exceeds the rest of the budget is skipped: `ONLY=` runs it later. A CPU runs the same stages as far
as it can, on small sizes, which keeps them working.

The results' folder gets check.json, the record of the check, with the device, the versions, the commit and the outcome
of every stage, and a record of each benchmark, eight files at most: `python -m benchmarks plots` draws them anywhere.
"""

import argparse
import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch: `make setup` makes an environment with one, PYTHON= names another")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cuda_toolkit
from stage import Stage, run

from benchmarks import DEVICES, ROOT

# Other imports from the benchmarks, and of the package, follow where they are used: they load the result of the build.

TITLE, KEYS = "The check", ["stage"]
BUDGET = 570  # seconds, so that a check takes less than ten minutes
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
WATCHDOG = ["-v", "-o", "faulthandler_timeout=20"]  # seconds of a test, after which all stacks are printed
PROCESSES = 6  # of the tests that share the GPU
PROGRAM = ROOT / "build" / "sanitized"
SANITIZERS = {"memcheck": 40, "racecheck": 60, "initcheck": 40, "synccheck": 40}
# The benchmarks that measure a kernel, with their limits in seconds: some before the sanitizers and tests, some after.
FIRST_BENCHMARKS, LAST_BENCHMARKS = {"op": 120, "counters": 60}, {"peers": 90, "latency": 60}

WHETHER_IT_LOADS = "import sys, rwkv_kernels; sys.exit({{i.name: i.reason for i in rwkv_kernels.backends()}}[{!r}])"


def stages(device: str, results: Path, peers: list[str], build: bool = True) -> Iterator[Stage]:
    """The stages in order. Each is decided when its turn comes, so that it may depend on the build."""
    on_gpu = device == "cuda"
    if build:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        yield Stage("build", command, 180, _build_environment() if on_gpu else {})
    else:
        yield Stage("build", [sys.executable, "-c", WHETHER_IT_LOADS.format(device)], 60)

    backends = _gpu_backends() if on_gpu else []
    required, chosen = [f"--require-backend={name}" for name in backends], " or ".join(backends)
    for name in backends:
        yield _tests(f"first_light_{name}", 75, f"first_light and {name}", [*required, *WATCHDOG])
    if on_gpu:
        yield _tests("stress", 90, chosen, [*required, "-m", "stress"])
    else:
        yield _tests("first_light", 60, "small and cpu", ["tests/test_operator.py"])
    for name, limit in FIRST_BENCHMARKS.items():
        yield _benchmark(name, limit, device, results)
    yield from _sanitizers(on_gpu)
    if on_gpu:
        several = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
        # The same with and without a GPU, and long.
        others = ["--ignore=tests/test_triton_compiled.py", "--ignore=tests/test_ptx.py"]
        yield _tests("tests", 150, chosen, [*required, *several, *others, "-m", "not stress"])
    for name, limit in LAST_BENCHMARKS.items():
        yield _benchmark(name, limit, device, results, [f"--peer={peer}" for peer in peers if name == "peers"])


def _build_environment() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    # Lines of the source in profiles, and the kernels, of one file, compiled side by side.
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "NVCC_APPEND_FLAGS": "-lineinfo --split-compile=0"}


def _gpu_backends() -> list[str]:
    """The backends whose skipped tests are failures: all that refuse a CPU's tensors, triton where it is installed."""
    import rwkv_kernels
    from benchmarks.device import takes

    names = [info.name for info in rwkv_kernels.backends() if not takes(info.name, "cpu")]
    return [name for name in names if name != "triton" or importlib.util.find_spec(name)]


def _tests(name: str, limit: int, chosen: str, options: list[str]) -> Stage:
    return Stage(name, [*PYTEST, "--durations=5", "-k", chosen, *options], limit, {"OMP_NUM_THREADS": "2"})


def _benchmark(name: str, limit: int, device: str, results: Path, options: list[str] | None = None) -> Stage:
    command = [sys.executable, "-m", "benchmarks", name, f"--device={device}", f"--results={results}"]
    return Stage(name, [*command, *([] if device == "cuda" else ["--smoke"]), *(options or [])], limit)


def _sanitizers(on_gpu: bool) -> Iterator[Stage]:
    """The kernels in a program without torch, alone and under every tool of compute-sanitizer."""
    why_not = None if on_gpu else "a CPU has none"
    architecture = _build_environment()["TORCH_CUDA_ARCH_LIST"] if on_gpu else ""
    yield Stage("program", [sys.executable, "tools/sanitized.py", str(PROGRAM), architecture], 120, why_not=why_not)
    yield Stage("program_runs", [str(PROGRAM), "hog"], 20, why_not=why_not)
    sanitizer = cuda_toolkit.find_program("compute-sanitizer") or "compute-sanitizer"
    for tool, limit in SANITIZERS.items():
        options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
        yield Stage(tool, [sanitizer, *options, str(PROGRAM)], limit, why_not=why_not)


def write_record(results: Path, outcomes: list[dict[str, Any]], device: str) -> None:
    """Writes check.json as far as the check has come.

    The stages of an earlier call in the same place stay in it, so that one call can go on where another ended.
    """
    from benchmarks.records import Record, environment

    record = Record("check", results, environment(device))
    earlier = Record.load(results / "check.json") if (results / "check.json").exists() else record
    known = earlier.tables[0].rows if earlier.tables and earlier.environment == record.environment else []
    rows = {row["stage"]: row for row in [*known, *outcomes]}
    record.add(TITLE, KEYS, list(rows.values()))


def run_all(arguments: argparse.Namespace, results: Path) -> list[dict[str, Any]]:
    """The outcome of every stage, written after each of them."""
    started = time.perf_counter()
    outcomes: list[dict[str, Any]] = []
    for stage in stages(arguments.device, results, arguments.peer, not arguments.no_build):
        if arguments.only and stage.name not in ["build", *arguments.only]:
            continue
        left = arguments.budget - (time.perf_counter() - started)
        if stage.why_not is None and stage.limit > left:
            budget = f"the budget of {arguments.budget} s, of which {left:.0f} are left"
            stage = Stage(stage.name, [], stage.limit, why_not=f"{stage.limit} s no longer fit into {budget}")
        outcomes.append(run(stage))
        write_record(results, outcomes, arguments.device)
        if stage.name == "build" and outcomes[-1]["outcome"] != "passed":
            break  # the other stages would test an older build
    return outcomes


def main() -> int:
    """Builds, tests, stresses, measures and sanitizes; the exit status is 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="tools/gpu_check.py", description=main.__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--results", type=Path, default=Path("build/gpu-check"), help="folder of the records")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="these stages and the build")
    parser.add_argument("--peer", action="append", default=[], help="NAME=FILE, see benchmarks/peers.py")
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for all stages (default: %(default)s)")
    parser.add_argument("--no-build", action="store_true", help="take the libraries that lie in the tree")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} sees no CUDA device. DEVICE=cpu runs what a CPU can.", file=sys.stderr
        )
        return 2

    # The end of this process also ends everything that a stage has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    results = arguments.results.resolve()
    outcomes = run_all(arguments, results)

    from benchmarks.records import Table

    print(f"\n{Table(TITLE, KEYS, outcomes).markdown()}\n\n{results}")
    unknown = set(arguments.only) - {row["stage"] for row in outcomes}
    if unknown and outcomes[0]["outcome"] == "passed":
        print(f"no stage is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    left = [row["stage"] for row in outcomes if "no longer fit" in row["outcome"]]
    if left:
        print(f'\nmake gpu-check NO_BUILD=1 ONLY="{" ".join(left)}" runs what did not fit.')
    return 1 if any(row["outcome"].startswith("failed") for row in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
