"""The order of the GPU kernels' accesses to memory: memory_order.cpp, on threads of the host, under ThreadSanitizer."""

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiled import compiled

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "memory_order.cpp"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-Wno-psabi"]

# Barriers that order nothing by themselves: their kind, and the kernel's text in their line. One that joins them could
# go; one that leaves them has become necessary.
VOTE = ("vote", "team.agree(")  # threads share only the vote
ORDER_NOTHING: dict[str, list[tuple[str, str]]] = {"forward": [], "backward": [VOTE], "reduce": []}
KINDS = {"forward": {"block", "warp", "vote"}, "backward": {"block", "warp", "vote"}, "reduce": {"block"}}


@functools.cache
def _launcher() -> list[str]:
    """The command that starts a program with ThreadSanitizer; skips the test where none runs.

    The tool needs parts of the address space that Linux may have assigned at random.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "nothing.cpp"
        source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
        program = source.with_suffix("")
        try:
            compiled = subprocess.run(
                [COMPILER, *FLAGS, str(source), "-o", str(program)], capture_output=True, text=True
            )
        except FileNotFoundError:
            pytest.skip(f"ThreadSanitizer: there is no compiler {COMPILER}")
        if compiled.returncode != 0:
            pytest.skip(f"ThreadSanitizer: {COMPILER} does not link it: {compiled.stderr.strip()[-300:]}")
        launchers: list[list[str]] = [[]]
        if shutil.which("setarch"):
            launchers.append(["setarch", platform.machine(), "-R"])
        said = ""
        for launcher in launchers:
            ran = subprocess.run([*launcher, str(program)], capture_output=True, text=True)
            if ran.returncode == 0:
                return launcher
            said = said or (ran.stdout + ran.stderr).strip()[-300:]
        pytest.skip(f"ThreadSanitizer: a program does not run with it: {said}")


@functools.cache
def _program() -> list[str]:
    """The program and the command that starts it."""
    launcher = _launcher()
    command = [COMPILER, *FLAGS, f"-I{ROOT / 'csrc'}", str(SOURCE)]
    return [*launcher, str(compiled("memory_order", command, SOURCE))]


def _run(*arguments: str) -> tuple[int, str]:
    """The exit status and all output."""
    # A report's lines in the source help only where no report is expected; finding them takes as long as all the rest.
    options = "" if arguments[0] == "run" else "symbolize=0"
    ran = subprocess.run(
        [*_program(), *arguments],
        env={**os.environ, "TSAN_OPTIONS": options},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return ran.returncode, ran.stdout


def _is_reported(*arguments: str) -> bool:
    """Whether the tool reports a race; every other failure is an error."""
    status, said = _run(*arguments)
    if status == 0:
        assert "data race" not in said
        return False
    assert "WARNING: ThreadSanitizer: data race" in said, said
    return True


@dataclass(frozen=True)
class Barrier:
    kind: str
    line: str  # file:line

    @property
    def text(self) -> str:
        file, line = self.line.split(":")
        return (ROOT / "csrc" / "gpu" / file).read_text().splitlines()[int(line) - 1].strip()

    def is_one_of(self, described: list[tuple[str, str]]) -> bool:
        return any(self.kind == kind and text in self.text for kind, text in described)


@functools.cache
def _barriers(kernel: str) -> list[Barrier]:
    status, said = _run("barriers")
    assert status == 0, said
    rows = [line.split() for line in said.splitlines()]
    return [Barrier(kind, line) for name, line, kind in rows if name == kernel]


@pytest.mark.parametrize("problem", ["partials", "anchors", "spread_keys", "several_tiles"])
def test_blocks_that_run_at_once_have_no_race_and_one_result(problem: str) -> None:
    """Random schedules, of two to four blocks at a time; the program compares with plain loops in float64, too."""
    status, said = _run("run", problem, "5")
    assert status == 0, said
    assert said.startswith("5 runs are equal"), said


@pytest.mark.parametrize("kernel", sorted(ORDER_NOTHING))
def test_every_barrier_is_needed_but_those_that_order_nothing(kernel: str) -> None:
    barriers = _barriers(kernel)
    assert {barrier.kind for barrier in barriers} == KINDS[kernel]
    unneeded = [barrier for barrier in barriers if not _is_reported("without-order", kernel, barrier.line)]
    listed = [barrier for barrier in barriers if barrier.is_one_of(ORDER_NOTHING[kernel])]
    assert len(listed) == len(ORDER_NOTHING[kernel])
    assert unneeded == listed, [f"{barrier.line}: {barrier.text}" for barrier in {*unneeded} ^ {*listed}]


@pytest.mark.parametrize("fault", ["plain-stores", "plain-loads", "late-copies", "relaxed-flag"])
def test_a_planted_fault_is_reported(fault: str) -> None:
    """Messages that are not atomic, copies that land behind the barrier, and a flag that orders no data beside it."""
    assert _is_reported(fault)


def test_a_flag_that_orders_the_data_beside_it_is_not_reported() -> None:
    assert not _is_reported("ordered-flag")
