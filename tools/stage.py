"""A command with a limit: at its end it is interrupted, has its stacks dumped, and is killed with all it started."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import CANNOT_RUN, ROOT

# Seconds to save what was measured once interrupted, and to dump the stacks.
PATIENCE, PATIENCE_FOR_STACKS = 10.0, 3.0


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take, and why it cannot run, if it cannot."""

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None


def run(stage: Stage) -> dict[str, Any]:
    """Runs a stage; its outcome begins with "passed", "failed" or "skipped"."""
    print(f"\n== {stage.name}: {stage.why_not or ' '.join(stage.command)}", flush=True)
    started = time.perf_counter()
    outcome = f"skipped: {stage.why_not}" if stage.why_not else _outcome(stage)
    return {"stage": stage.name, "outcome": outcome, "seconds": time.perf_counter() - started}


def _outcome(stage: Stage) -> str:
    environment = {
        **os.environ,
        # ninja and other programs of this Python's environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT dumps the stacks, within a call of C++, too
        "PYTHONUNBUFFERED": "1",
        **stage.environment,
    }
    try:
        process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True)
    except FileNotFoundError:
        return f"failed: there is no {stage.command[0]}"
    try:
        code = process.wait(stage.limit)
    except subprocess.TimeoutExpired:
        return f"failed to end within {stage.limit} s"
    finally:
        _end(process)
    if code == CANNOT_RUN:
        return "skipped: it cannot run here, and says why"
    return "passed" if code == 0 else f"failed with exit status {code}"


# ---- the end of a process and of everything that it has started ----

Process = tuple[int, str]  # its number and when it began: numbers are used again


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Leaves nothing running of what the process has started, nor itself."""
    # A process that has left the session is found by its parents as long as these live.
    family = _family(process.pid)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    if process.poll() is None:
        family |= _family(process.pid)
        # One at a time, the stage itself first: they share an output, and stacks written together cannot be read.
        deadline = time.monotonic() + PATIENCE_FOR_STACKS
        for member in sorted(family, key=lambda member: (member[0] != process.pid, member)):
            _send(signal.SIGABRT, {member})
            while member in _all_processes() and time.monotonic() < deadline:
                time.sleep(0.01)
    for _ in range(100):  # not for ever: a process within a call of a driver may not die
        family |= _family(process.pid)
        _send(signal.SIGKILL, family)
        if process.poll() is not None and not family & set(_all_processes()):
            return
        time.sleep(0.05)


def _all_processes() -> dict[Process, tuple[int, int]]:
    """Parent and session of all running processes, without zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may be gone by now
            # After the name, which may have any letters: state, parent, group, session, ...
            values = path.read_text().rpartition(")")[2].split()
            if values[0] not in "ZX":
                found[int(path.parent.name), values[19]] = (int(values[1]), int(values[3]))
    return found


def _family(leader: int) -> set[Process]:
    """The processes of the leader's session, and what descends from them.

    Not its process group alone: ninja starts each of its children in a new one.
    """
    running = _all_processes()
    family = {process for process, (_, session) in running.items() if session == leader}
    while True:
        numbers = {number for number, _ in family}
        more = {process for process, (parent, _) in running.items() if parent in numbers} - family
        if not more:
            return family
        family |= more


def _send(number: signal.Signals, processes: set[Process]) -> None:
    for process, _ in processes & set(_all_processes()):
        with suppress(ProcessLookupError):
            os.kill(process, number)
