"""`make gpu-check`: everything that a GPU has to show, offline, with the python and torch that are there.

It builds for the present GPU, runs the whole suite on it, its kernels under compute-sanitizer, the stress tests and the
benchmarks, each in a process of its own, so that one that crashes or hangs costs the others nothing. It lies among the
benchmarks because its folder is theirs and more: check.json has the device, the versions, the commit and the outcome of
every stage. A CPU runs the same stages as far as it can, on small sizes, which keeps them working.

The aim is less than 9 minutes on an H100 with 16 cores: build 1, suite 2½, sanitizer 1½, stress 1½, benchmarks 2. The
benchmarks are those that tell of a kernel; `make bench` has the others, too.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402

TITLE, KEYS = "The check", ["stage"]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
STRESS = ["tests/test_gpu.py", "tests/test_stress.py"]
# What is the same with and without a GPU.
OF_THE_CPU = ["gpu_programs", "gpu_plan", "gpu_check", "ptx", "triton_compiled", "cpu", "oracle", "build", "structure"]


# Of the benchmarks those that tell of a kernel, each with the seconds that it may take.
BENCHMARKS = {"op": 120, "crossover": 90, "choices": 60, "latency": 90, "peers": 120}


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take, and why it cannot run, if it cannot."""

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None


def stages(device: str, results: Path, peers: list[str]) -> Iterator[Stage]:
    """The stages in order. What a stage is told is decided when its turn comes, so that it may rest on the build."""
    on_gpu = device == "cuda"
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    yield Stage("build", build, 180, _architecture() if on_gpu else {})

    required = _required_backends() if on_gpu else []
    everything_else = [f"--ignore={path}" for path in [*STRESS, *(f"tests/test_{name}.py" for name in OF_THE_CPU)]]
    a_few = ["tests/test_operator.py", "-k", "small and cpu"]
    yield Stage("suite", [*PYTEST, *required, "--durations=10", *(everything_else if on_gpu else a_few)], 300)

    options = [f"--device={device}", f"--results={results}", *([] if on_gpu else ["--smoke"])]
    for name, limit in BENCHMARKS.items():
        command = [sys.executable, "-m", "benchmarks", name, *options]
        why_not = "a CPU has no schedules" if name in ("crossover", "choices") and not on_gpu else None
        yield Stage(name, command + [f"--peer={peer}" for peer in peers if name == "peers"], limit, why_not=why_not)

    yield Stage("stress", [*PYTEST, *required, "--durations=10", *STRESS], 150)
    yield _sanitizer("memcheck", on_gpu)
    yield _sanitizer("racecheck", on_gpu)


def _architecture() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}


def _required_backends() -> list[str]:
    """The backends whose skipped tests are failures: of those that the package has, the ones that belong here."""
    import rwkv_kernels  # not before the build: it loads what the build makes

    names = [info.name for info in rwkv_kernels.backends()]
    with_triton = "triton" in names and importlib.util.find_spec("triton")
    return ["--require-backend=cuda", *(["--require-backend=triton"] if with_triton else [])]


def _sanitizer(tool: str, on_gpu: bool) -> Stage:
    toolkit = cuda_toolkit.find_toolkit()
    folders = [os.environ["PATH"], *([str(toolkit.home / "bin")] if toolkit else [])]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders)) or "compute-sanitizer"
    why_not = None if on_gpu else "a CPU has none"
    few = "edges and cuda and (chunked or single_pass) and not float64"
    tests = [*PYTEST, "-x", "--require-backend=cuda", "tests/test_gpu.py", "-k", few]
    # Within torch's cache of memory a kernel could leave its tensor without leaving what was allocated.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, [program, "--tool", tool, "--error-exitcode", "1", *tests], 90, uncached, why_not)


def run(stage: Stage) -> dict[str, Any]:
    """Runs a stage; its outcome begins with "passed", "failed" or "skipped"."""
    print(f"\n== {stage.name}: {stage.why_not or ' '.join(stage.command)}", flush=True)
    started = time.perf_counter()
    outcome = f"skipped: {stage.why_not}"
    if stage.why_not is None:
        # A session of its own, so that the end of its time is the end of its children, too.
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env={**os.environ, **stage.environment}, start_new_session=True
            )
        except FileNotFoundError:
            return {"stage": stage.name, "outcome": f"failed: there is no {stage.command[0]}", "seconds": 0.0}
        try:
            code = process.wait(stage.limit)
            outcome = "passed" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"failed to end within {stage.limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"stage": stage.name, "outcome": outcome, "seconds": time.perf_counter() - started}


def write_record(results: Path, outcomes: list[dict[str, Any]], device: str) -> None:
    """Writes check.json, what is known so far: a record of the check itself, beside those of the benchmarks."""
    from benchmarks.records import Record, Table, environment  # not before the build: it loads what the build makes

    Record("check", results, environment(device), [Table(TITLE, KEYS, outcomes)]).save()


def main() -> int:
    """Builds, tests, sanitizes, stresses and measures; the exit status is 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=main.__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--results", type=Path, default=Path("build/gpu-check"), help="folder of the records and the plots"
    )
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="these stages and the build")
    parser.add_argument("--peer", action="append", default=[], help="NAME=FILE, see benchmarks/peers.py")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} sees no CUDA device. DEVICE=cpu runs what a CPU can.", file=sys.stderr
        )
        return 2

    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage in stages(arguments.device, results, arguments.peer):
        if arguments.only and stage.name not in ["build", *arguments.only]:
            continue
        outcomes.append(run(stage))
        write_record(results, outcomes, arguments.device)
        if stage.name == "build" and outcomes[-1]["outcome"] != "passed":
            break  # the other stages would tell of an older build

    from benchmarks.records import Table

    print(f"\n{Table(TITLE, KEYS, outcomes).markdown()}\n\n{results}")
    return 1 if any(row["outcome"].startswith("failed") for row in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
