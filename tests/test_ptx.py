"""The PTX that nvcc makes of the GPU kernels, run on the CPU as the host would launch it.

The program that RWKV_KERNELS_PTX_RUNNER names translates PTX to machine code of this processor. It checks every access
against the tensors of the call, starts shared memory as NaN, delivers asynchronous copies as late as allowed, and
switches between threads in a chosen order.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import DTYPES, PROBLEMS, Problem, assert_solves, make, solve
from test_gpu_programs import PLANS, plans_for

gpu_programs = pytest.importorskip("gpu_programs", reason="the extension is not built")
emulated_backend = pytest.importorskip("emulated_backend")

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif("RWKV_KERNELS_PTX_RUNNER" not in os.environ, reason="RWKV_KERNELS_PTX_RUNNER names no program"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
]

# Turing copies to shared memory through registers, later GPUs asynchronously.
SUITE_ARCHITECTURE = "sm_90"
OLDEST_ARCHITECTURE = "sm_75"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptx")


def test_the_suite_passes_on_the_ptx() -> None:
    """Outputs, states and gradients of every problem, dtype and special value, threads switched at random."""
    files = [str(HERE / f"test_{name}.py") for name in ("operator", "state", "special_values")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated_backend", *files, "-k", "emulated"],
        env={
            **os.environ,
            "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "WKV_TEST_ARCHITECTURE": SUITE_ARCHITECTURE,
        },
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    print("\n".join(result.stdout.splitlines()[-6:]))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_programs.name_of)
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype: torch.dtype, folder: Path) -> None:
    tensors = make(Problem(B=2, T=300, C=70, with_state=True), dtype)
    for plan in plans_for(dtype):
        runner = gpu_programs.PtxRunner(folder, SUITE_ARCHITECTURE)
        with emulated_backend.emulated(runner, *PLANS[plan]) as backend:
            assert_solves(tensors, backend)
            expected = solve(tensors, backend)
            for runner.order, runner.seed in [("rev", 0), ("random", 1), ("random", 2)]:
                for name, value in solve(tensors, backend).items():
                    assert torch.equal(value, expected[name]), (plan, runner.order, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_programs.name_of)
def test_the_oldest_architecture_equals_the_oracle(dtype: torch.dtype, folder: Path) -> None:
    for order in ("fwd", "rev", "random"):
        runner = gpu_programs.PtxRunner(folder, OLDEST_ARCHITECTURE, order)
        for plan in ("serial", "chunked", "single_pass"):
            with emulated_backend.emulated(runner, *PLANS[plan]) as backend:
                for name in ("two_checkpoints_and_one", "wide", "k_of_1000", "u_of_plus_50", "time_major"):
                    assert_solves(make(PROBLEMS[name], dtype), backend)
