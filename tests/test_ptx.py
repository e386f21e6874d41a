"""The PTX that nvcc makes of the GPU kernels, run on the CPU as the host would launch it.

The program that RWKV_KERNELS_PTX_RUNNER names translates PTX to machine code of this processor. It checks every access
against the tensors of the call, starts shared memory as NaN, delivers asynchronous copies as late as allowed, and
switches between threads in a chosen order.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from problems import DTYPES, PROBLEMS, Problem, assert_solves, make, solve
from test_gpu_plan import H100
from test_gpu_programs import GROUPS_OF_CHUNKS, PLANS, plans_for

gpu_programs = pytest.importorskip("gpu_programs", reason="rwkv_kernels._introspection is not built")
emulated_backend = pytest.importorskip("emulated_backend")

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.ptx,
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
    # Rows of whole vectors, which are copied asynchronously; most other problems have none.
    tensors = make(Problem(B=2, T=200, C=72, with_state=True), dtype)
    plans = {"serial", "serial_single_spans", "chunks_of_several_tiles", "single_pass_of_small_tiles"}
    for plan in plans & set(plans_for(dtype)):
        runner = gpu_programs.PtxRunner(folder, SUITE_ARCHITECTURE)
        with emulated_backend.emulated(runner, *PLANS[plan]) as backend:
            assert_solves(tensors, backend)
            expected = solve(tensors, backend)
            for runner.order in ("rev", "random"):
                for name, value in solve(tensors, backend).items():
                    assert torch.equal(value, expected[name]), (plan, runner.order, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_programs.name_of)
def test_the_oldest_architecture_equals_the_oracle(dtype: torch.dtype, folder: Path) -> None:
    runner = gpu_programs.PtxRunner(folder, OLDEST_ARCHITECTURE)
    for plan, runner.order in itertools.product(("serial", "chunked", "single_pass"), ("fwd", "rev", "random")):
        with emulated_backend.emulated(runner, *PLANS[plan]) as backend:
            for name in ("two_checkpoints_and_one", "k_of_1000", "u_of_plus_50"):
                assert_solves(make(PROBLEMS[name], dtype), backend)


def test_groups_of_chunks_hand_over(folder: Path) -> None:
    runner = gpu_programs.PtxRunner(folder, SUITE_ARCHITECTURE, "random")
    for plan in ("single_pass_of_small_tiles", "single_pass_of_two_spans"):
        with emulated_backend.emulated(runner, *PLANS[plan]) as backend:
            assert_solves(make(GROUPS_OF_CHUNKS["of_3"], torch.bfloat16), backend)


class Budget(NamedTuple):
    """For one element; traffic in bytes, between the threads and memory or the caches in front of it."""

    instructions: float
    mufu: float
    traffic: float


def _spent(executed: Counter[str], elements: int) -> Budget:
    """What a kernel executed, moves between registers aside: these are the assembler's to remove."""

    def count(prefixes: tuple[str, ...]) -> int:
        return sum(times for operation, times in executed.items() if operation.startswith(prefixes))

    bytes_moved = 16 * count(("cp.async.cg.",))
    for operation, times in executed.items():
        if operation.startswith(("ld.", "st.")) and not re.search("shared|param|local", operation):
            vector, bits = re.findall(r"(?:\.v(\d))?\.[a-z](\d+)$", operation)[0]
            bytes_moved += int(vector or 1) * int(bits) // 8 * times
    instructions = executed.total() - count(("mov.",))
    mufu = count(("ex2.approx", "rcp.approx", "lg2.approx"))
    return Budget(instructions / elements, mufu / elements, bytes_moved / elements)


# The plans of forward and backward. A device of so few multiprocessors is full of the sequences, as any is of a large
# problem's: chunks hand over one by one, not in groups.
FULL_DEVICE = {**H100, "multiprocessors": 33}
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "serial": ({"schedule": "serial", "spans": 1}, {"schedule": "serial"}),
    "single_pass": ({"schedule": "single_pass", "spans": 4}, {"schedule": "single_pass"}),
    "single_pass_on_a_full_device": (
        {"schedule": "single_pass", "spans": 4, "limits": FULL_DEVICE},
        {"schedule": "single_pass", "limits": FULL_DEVICE},
    ),
}

# Traffic: three tensors, and five; checkpoints every 64 steps; what chunks hand over, written once, and read by those
# of a group, from the cache. Instructions: what an H100 has time for meanwhile, docs/kernels.md.
BUDGETS = {
    ("forward", "serial", "bfloat16"): Budget(28, 2.1, 6.3),
    ("forward", "serial", "float32"): Budget(26, 2.1, 12.3),
    ("forward", "single_pass", "bfloat16"): Budget(43, 3.2, 6.5),
    ("forward", "single_pass", "float32"): Budget(39, 3.2, 12.5),
    ("forward", "single_pass_on_a_full_device", "bfloat16"): Budget(43, 3.2, 6.4),
    ("forward", "single_pass_on_a_full_device", "float32"): Budget(39, 3.2, 12.4),
    ("backward", "serial", "bfloat16"): Budget(80, 4.5, 10.4),
    ("backward", "serial", "float32"): Budget(74, 4.5, 20.4),
    ("backward", "single_pass", "bfloat16"): Budget(88, 4.5, 11.1),
    ("backward", "single_pass", "float32"): Budget(82, 4.5, 21.1),
    ("backward", "single_pass_on_a_full_device", "bfloat16"): Budget(88, 4.5, 10.8),
    ("backward", "single_pass_on_a_full_device", "float32"): Budget(82, 4.5, 20.8),
}


def _counts(problem: Problem, schedule: str, dtype: torch.dtype, folder: Path) -> dict[str, Budget]:
    """For each kernel of the operator and its gradient."""
    executed: dict[str, Counter[str]] = {}
    runner = gpu_programs.PtxRunner(folder, SUITE_ARCHITECTURE, counted=executed)
    with emulated_backend.emulated(runner, *SCHEDULES[schedule]) as backend:
        solve(make(problem, dtype), backend)
    elements = problem.B * problem.T * problem.C
    return {kernel: _spent(counts, elements) for kernel, counts in executed.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=gpu_programs.name_of)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_kernel_keeps_to_its_budget(schedule: str, dtype: torch.dtype, folder: Path) -> None:
    name = gpu_programs.name_of(dtype)
    for kernel, spent in _counts(Problem(B=33, T=512, C=64), schedule, dtype, folder).items():
        print(f"{kernel} {schedule} {name}", *(f"{value:.2f}" for value in spent))
        budget = BUDGETS.get((kernel.removesuffix("_single_pass"), schedule, name))
        if budget is not None:
            assert all(value <= limit for value, limit in zip(spent, budget, strict=True)), (kernel, spent, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=gpu_programs.name_of)
@pytest.mark.parametrize("schedule", ["serial", "single_pass"])
def test_keys_that_spread_cost_half_as_much_again_at_most(schedule: str, dtype: torch.dtype, folder: Path) -> None:
    usual = _counts(Problem(T=512, C=64), schedule, dtype, folder)
    spread = _counts(Problem(T=512, C=64, k_scale=20.0), schedule, dtype, folder)
    for kernel in usual:
        ratio = spread[kernel].instructions / usual[kernel].instructions
        print(f"{kernel} {schedule} {gpu_programs.name_of(dtype)} {ratio:.2f}")
        assert ratio <= 1.5, (kernel, ratio)
