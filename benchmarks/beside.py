"""Small calls of this tree and of another one, in processes that take turns.

On a machine with other work, two runs after each other differ by more than the cost of a call does. Here each round
times the same calls in both trees within a fraction of a second, and the difference is taken within the round. Several
pairs of processes are started: where a process has its memory makes a difference, and no more rounds average it out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.device import Device, quartiles
from benchmarks.records import Record, Row

TITLE = "Latency beside {tree}: medians over the rounds; differences are taken within a round"
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).parent / "small_calls.py"
IMPORT = "import rwkv_kernels after torch"
PROCESSES, ROUNDS, REPETITIONS = 8, 12, 60


def run(device: Device, record: Record, tree: Path) -> None:
    """Microseconds per call here and there."""
    processes, rounds, repetitions = (1, 2, 2) if device.smoke else (PROCESSES, ROUNDS, REPETITIONS)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number in range(processes):
        with ExitStack() as stack:
            # Neither tree is always the first.
            order = (ROOT, tree.resolve()) if number % 2 == 0 else (tree.resolve(), ROOT)
            children = [stack.enter_context(_started(folder)) for folder in order]
            answers = [[{IMPORT: _answer(child)["seconds"]} for child in children]]
            answers += [[_asked(child, repetitions) for child in children] for _ in range(rounds)]
        for first, second in answers:
            here, there = (first, second) if number % 2 == 0 else (second, first)
            for name, seconds in here.items():
                pairs.setdefault(name, []).append((seconds, there[name]))
        record.add(TITLE.format(tree=tree.name), ["call"], [_row(name, found) for name, found in pairs.items()])


def _row(name: str, pairs: list[tuple[float, float]]) -> Row:
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


@contextmanager
def _started(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process of the program with the package of a tree, ended with the block."""
    # As text, so that the folder of this module is not on the path.
    command = [sys.executable, "-c", PROGRAM.read_text()]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _asked(process: "subprocess.Popen[str]", repetitions: int) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write(f"{repetitions}\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process in {process.args!r} has ended")
    return json.loads(line)
