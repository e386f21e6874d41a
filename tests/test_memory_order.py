"""The order of the GPU kernels' accesses to memory: memory_order.cpp, on threads of the host, under ThreadSanitizer."""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "memory_order.cpp"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-Wno-psabi"]

# Barriers that order nothing by themselves, by what the kernel says in their line. A barrier that becomes one of them
# could go; one that no longer is, is needed by something new.
ORDER_NOTHING = {
    "forward": [
        "team.agree(",  # threads learn of the vote alone
        "{ stage_tile(",  # the wait for the copies has the next barrier
        "{ wait_for_copies(); });",  # of the whole block, before another tile comes; one of these two would do
        "team.phase(bring_back)",
    ],
    "backward": [
        "team.agree(",
        "{ stage_at(",
        "{ wait_for_copies(); });",  # the barrier behind the last tile's gradients would do
    ],
    "reduce": [],
}


@functools.cache
def _launcher() -> list[str]:
    """What a program with ThreadSanitizer is started by; the test is skipped where none runs.

    The tool needs parts of the address space that Linux may have given away at random.
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
    """Compiled once for all processes that test the same sources: by their content, in build/memory_order."""
    launcher = _launcher()
    command = [COMPILER, *FLAGS, f"-I{ROOT / 'csrc'}", str(SOURCE)]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(repr(command).encode() + version)
    headers = [path for pattern in ("*.h", "*.def") for path in (ROOT / "csrc").rglob(pattern)]
    for path in [SOURCE, *sorted(headers)]:
        content.update(path.read_bytes())
    compiled = ROOT / "build" / "memory_order" / content.hexdigest()[:16]
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with (compiled.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            unfinished = compiled.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(compiled)
    return [*launcher, str(compiled)]


def _run(*arguments: str) -> tuple[int, str]:
    """The exit status and everything that was said."""
    # Where a report's calls stand in the source is of use where there should be none; it takes as long as all the rest.
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
    """Whether the tool says that there is a race; nothing else may be wrong."""
    status, said = _run(*arguments)
    if status == 0:
        assert "data race" not in said
        return False
    assert "WARNING: ThreadSanitizer: data race" in said, said
    return True


@functools.cache
def _barriers() -> list[tuple[str, int, str]]:
    """Of each kernel the barriers, in their order: kernel, line, kind."""
    status, said = _run("barriers")
    assert status == 0, said
    return [(kernel, int(line), kind) for kernel, line, kind in map(str.split, said.splitlines())]


@pytest.mark.parametrize("problem", ["partials", "anchors", "spread_keys", "several_tiles"])
def test_blocks_that_run_at_once_have_no_race_and_one_result(problem: str) -> None:
    """Random schedules, of two to four blocks at a time; the program compares with plain loops in float64, too."""
    status, said = _run("run", problem, "5")
    assert status == 0, said
    assert said.startswith("5 runs are equal"), said


@pytest.mark.parametrize("kernel", sorted(ORDER_NOTHING))
def test_every_barrier_but_those_that_order_nothing_is_needed(kernel: str) -> None:
    header = ROOT / "csrc" / "gpu" / ("small.h" if kernel == "reduce" else f"{kernel}.h")
    lines = header.read_text().splitlines()
    of_kernel = [(line, kind) for name, line, kind in _barriers() if name == kernel]
    assert {"forward": {"block", "warp", "vote"}, "backward": {"block", "warp", "vote"}, "reduce": {"block"}}[
        kernel
    ] == {kind for _, kind in of_kernel}
    unreported = [line for line, _ in of_kernel if not _is_reported("without-order", kernel, str(line))]
    expected = [
        line
        for line, kind in of_kernel
        if any(text in lines[line - 1] for text in ORDER_NOTHING[kernel])
        # The warp's barrier that every tile's copies are awaited with has the same words.
        and not (kind == "warp" and "wait_for_copies" in lines[line - 1])
    ]
    assert len(expected) == len(ORDER_NOTHING[kernel])
    assert unreported == expected, {line: lines[line - 1].strip() for line in {*unreported} ^ {*expected}}


def test_of_two_barriers_between_tiles_one_is_needed() -> None:
    lines = (ROOT / "csrc" / "gpu" / "forward.h").read_text().splitlines()
    between = [
        str(line)
        for kernel, line, kind in _barriers()
        if kernel == "forward"
        and kind == "block"
        and any(text in lines[line - 1] for text in ("wait_for_copies", "bring_back"))
    ]
    assert len(between) == 2
    assert _is_reported("without-order", "forward", *between)


@pytest.mark.parametrize("fault", ["plain-stores", "plain-loads", "late-copies", "relaxed-flag"])
def test_a_planted_fault_is_reported(fault: str) -> None:
    """Messages that are not atomic, copies that land behind the barrier, and a flag that orders no data beside it."""
    assert _is_reported(fault)


def test_a_flag_that_orders_the_data_beside_it_is_not_reported() -> None:
    assert not _is_reported("ordered-flag")
