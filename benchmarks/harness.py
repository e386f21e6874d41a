"""How times are taken and kept: alternating runs, medians with quartiles, records that say where they come from."""

import ctypes
import json
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.benchmark

import rwkv_kernels

Row = dict[str, Any]

RUNS = 25


def keep_freed_memory() -> None:
    """Keeps glibc from returning large freed blocks to the system.

    A fresh block costs a page fault for every 4 KiB, several times what a memory-bound kernel takes; a training loop
    meets that once, a benchmark that allocates its outputs would meet it in every run.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, huge = -1, -3, 2**30
        libc.mallopt(M_TRIM_THRESHOLD, huge)
        libc.mallopt(M_MMAP_THRESHOLD, huge)


def alternate(calls: dict[str, Callable[[int], object]], runs: int = RUNS, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call over several runs, the calls taking turns so that a change of clock meets all of them.

    A call gets the number of its run, by which it may rotate its data.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(-warm_up, runs):
        for name, call in calls.items():
            timer = torch.utils.benchmark.Timer(
                "call(run)", globals={"call": call, "run": run}, num_threads=torch.get_num_threads()
            )
            elapsed = timer.timeit(1).median
            if run >= 0:
                seconds[name].append(elapsed)
    return seconds


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) < 2:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4)
    return low, middle, high


def spread(samples: Sequence[float]) -> float:
    """The distance of the quartiles as a part of the median: above 0.2 a run was noisy."""
    low, middle, high = quartiles(samples)
    return (high - low) / middle


def environment() -> dict[str, Any]:
    """What a record must say to be comparable."""
    build = rwkv_kernels.build_info()
    return {
        "rwkv_kernels": rwkv_kernels.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": build.cpu_instruction_set,
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
    }


def _output(*command: str) -> str:
    """What a program prints, nothing if it is not installed."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which(command[0]) else ""


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table; hidden columns, the raw samples, begin with an underscore."""
    names = [name for name in rows[0] if not name.startswith("_")]
    cells = [[_format(row[name]) for name in names] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.1e}" if value != 0 and abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    )


def save(directory: Path, name: str, title: str, rows: list[Row]) -> None:
    """Writes `name`.json: where it was measured, and every row with its raw samples."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "environment": environment(), "rows": rows}
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def write_tables(directory: Path, names: list[str]) -> None:
    """Writes tables.md from the records that the folder has."""
    sections = []
    for name in names:
        path = directory / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            where = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
            command = f"python -m benchmarks {name} --results {directory}"
            sections.append(f"## {record['title']}\n\n{markdown_table(record['rows'])}\n\n`{command}`: {where}.\n")
    (directory / "tables.md").write_text("\n".join(sections))
