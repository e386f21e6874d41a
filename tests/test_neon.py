"""The CPU kernels on aarch64, whose baseline is NEON: compiled here, and run where qemu-aarch64 is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import cpu_report  # noqa: E402

NEON = cpu_report.TARGETS["NEON"]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if shutil.which(NEON.compiler) is None:
        pytest.skip(f"no {NEON.compiler}")


def test_kernels_equal_the_recurrence_in_float64(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64, of the package qemu-user")
    program = tmp_path / "kernel_alone"
    command = [NEON.compiler, *cpu_report.FLAGS, "-static", "-Wno-psabi", "tests/kernel_alone.cpp", "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([emulator, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("\n") == 24


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loops_over_steps_move_nothing_lane_by_lane(dtype: str) -> None:
    found = 0
    for function, lines in cpu_report.functions(NEON, dtype).items():
        for loop in cpu_report.innermost_loops(lines):
            if cpu_report.kind_of(loop, NEON, function) is not None:
                lanes = [line for line in loop if re.match(r"(ins|[us]mov)\s|fmov\s+[sd]\d+, [wx]\d", line)]
                assert not lanes, lanes
                found += 1
    assert found >= 6
