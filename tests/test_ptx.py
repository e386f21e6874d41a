"""The PTX that nvcc makes of the GPU kernels, run on the CPU as the host would launch it.

tools/ptx translates PTX to machine code of this processor. It checks every access against the tensors of the call,
starts shared memory as NaN, delivers asynchronous copies as late as allowed, and switches between threads in a chosen
order.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import bi_problems
import ptx
import pytest
import torch
from problems import MIXING_PROBLEMS, PROBLEMS, Problem, assert_solves, make, solve
from test_gpu_emulated import LIMITS, LONG_AMONG_SHORT, OVER_ANCHORS, SEVERAL_TILES, plan_of, run_bad_boundaries
from test_gpu_summaries import assert_summaries, summaries_of
from torch import Tensor

from rwkv_kernels.inputs import DTYPES

gpu_host = pytest.importorskip("gpu_host")
emulated_backend = pytest.importorskip("emulated_backend")

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(ptx.unavailable() is not None, reason=str(ptx.unavailable())),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
]

# Turing copies to shared memory through registers, later GPUs asynchronously.
SUITE_ARCHITECTURE = "sm_90"
OLDEST_ARCHITECTURE = "sm_75"


@pytest.mark.parametrize("names", [("operator", "state", "special_values"), ("bidirectional",)], ids=" ".join)
def test_the_suite_passes_on_the_ptx(names: tuple[str, ...]) -> None:
    """Outputs, states and gradients of every problem, dtype and special value, threads in random order."""
    files = [str(HERE / f"test_{name}.py") for name in names]
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


# Rows of whole vectors, which are copied asynchronously; most other problems have none.
WHOLE_VECTORS = Problem(B=2, T=300, C=72, with_state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["H100", "small_tiles"])
def test_the_order_of_threads_and_blocks_changes_no_bit(limits: str, dtype: torch.dtype) -> None:
    for problem in (WHOLE_VECTORS, replace(SEVERAL_TILES, C=8)):
        tensors = make(problem, dtype)
        runner = gpu_host.PtxRunner(SUITE_ARCHITECTURE, limits=LIMITS[limits])
        with emulated_backend.emulated(runner) as backend:
            assert_solves(tensors, backend)
            expected = solve(tensors, backend)
            for runner.order in ("reversed", "shuffled"):
                for name, value in solve(tensors, backend).items():
                    assert torch.equal(value, expected[name]), (runner.order, name)


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
def test_a_device_that_holds_few_blocks_ends(order: str, resident: int) -> None:
    """No block waits for one that is not resident yet."""
    tensors = make(Problem(B=2, T=2100, C=72, with_state=True), torch.bfloat16)
    for limits in ("H100", "small_tiles"):
        runner = gpu_host.PtxRunner(SUITE_ARCHITECTURE, order, limits=LIMITS[limits], resident=resident)
        with emulated_backend.emulated(runner) as backend:
            assert_solves(tensors, backend, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
def test_the_oldest_architecture_equals_the_oracle(dtype: torch.dtype) -> None:
    problems = [*(PROBLEMS[name] for name in ("two_checkpoints_and_one", "k_of_1000", "u_of_plus_50")), WHOLE_VECTORS]
    for order in ("forward", "reversed", "shuffled"):
        runner = gpu_host.PtxRunner(OLDEST_ARCHITECTURE, order, limits=gpu_host.T4)
        with emulated_backend.emulated(runner) as backend:
            for problem in problems:
                assert_solves(make(problem, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=gpu_host.name_of)
def test_no_address_has_to_be_a_multiple_of_more_than_an_element(dtype: torch.dtype) -> None:
    """The runner reports an access whose address is not a multiple of its size."""

    def shifted(x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    tensors = make(Problem(B=1, T=200, C=64, with_state=True), dtype)
    with emulated_backend.emulated(gpu_host.PtxRunner(SUITE_ARCHITECTURE)) as backend:
        assert_solves(tensors.changed(shifted), backend, exact_backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
@pytest.mark.parametrize("problem", OVER_ANCHORS)
def test_states_pass_through_many_chunks(problem: str, dtype: torch.dtype) -> None:
    given = OVER_ANCHORS[problem]
    for operation in ("forward", "backward"):
        plan = plan_of(operation, dtype, given, gpu_host.H100)
        assert 1 < plan["anchor"] < plan["chunks"] - 1
    with emulated_backend.emulated(gpu_host.PtxRunner(SUITE_ARCHITECTURE, "shuffled")) as backend:
        assert_solves(make(given, dtype), backend, "cpu")


# ---- gates and packed sequences ----

MIXING = {
    **{name: MIXING_PROBLEMS[name] for name in ("gated_above_a_checkpoint", "gated_k_of_20", "packed_of_all_lengths")},
    **{name: MIXING_PROBLEMS[name] for name in ("packed_many_tiny", "packed_one_huge", "packed_k_of_20")},
    "gated_and_packed_k_of_20": MIXING_PROBLEMS["gated_and_packed_k_of_20"],
    "gated_whole_vectors": replace(WHOLE_VECTORS, gated=True),
    "gated_several_tiles": replace(SEVERAL_TILES, C=8, gated=True),
    "gated_and_packed": replace(LONG_AMONG_SHORT, C=8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["H100", "small_tiles"])
def test_gates_and_packed_sequences_equal_the_oracle_in_any_order(limits: str, dtype: torch.dtype) -> None:
    for name, problem in MIXING.items():
        tensors = make(problem, dtype)
        runner = gpu_host.PtxRunner(SUITE_ARCHITECTURE, limits=LIMITS[limits], resident=1)
        with emulated_backend.emulated(runner) as backend:
            assert_solves(tensors, backend)
            expected = solve(tensors, backend)
            runner.resident = 0
            for runner.order in ("reversed", "shuffled"):
                for output, value in solve(tensors, backend).items():
                    assert torch.equal(value, expected[output]), (name, runner.order, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
def test_boundaries_that_are_none_end_and_touch_nothing_else(dtype: torch.dtype) -> None:
    for seed, (total, order) in enumerate([(64, "forward"), (300, "reversed"), (701, "shuffled")]):
        run_bad_boundaries(gpu_host.PtxRunner(SUITE_ARCHITECTURE, order, resident=1), dtype, total, seed)


# ---- both directions ----

# Whole intervals that share an exponent, and others.
BI_NAMES = ("gated_wide", "packed_of_all_lengths", "k_of_20", "growing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
@pytest.mark.parametrize("architecture", [SUITE_ARCHITECTURE, OLDEST_ARCHITECTURE])
def test_both_directions_equal_the_oracle_in_any_order(architecture: str, dtype: torch.dtype) -> None:
    for name in BI_NAMES:
        tensors = bi_problems.make(bi_problems.PROBLEMS[name], dtype)
        runner = gpu_host.PtxRunner(architecture, resident=1)
        with emulated_backend.emulated(runner) as backend:
            bi_problems.assert_solves(tensors, backend)
            expected = bi_problems.solve_by(tensors, backend)
            runner.resident = 0
            for runner.order in ("reversed", "shuffled"):
                for output, value in bi_problems.solve_by(tensors, backend).items():
                    assert torch.equal(value, expected[output]), (name, runner.order, output)


# ---- summaries ----


SUMMARIES = {
    **{name: PROBLEMS[name] for name in ("two_checkpoints_and_one", "k_of_1000", "u_of_plus_50", "strong_decay")},
    **{name: MIXING_PROBLEMS[name] for name in ("gated_above_a_checkpoint", "gated_k_of_20")},
    "whole_vectors": WHOLE_VECTORS,
    "gated_several_tiles": replace(SEVERAL_TILES, C=8, gated=True),
    "gated_over_anchors": replace(OVER_ANCHORS["one_sequence"], gated=True),
}


@pytest.mark.parametrize(
    ("limits", "dtype"),
    [
        *(("H100", dtype) for dtype in DTYPES),
        ("T4", torch.bfloat16),
        ("small_tiles", torch.float32),
        ("small_tiles", torch.bfloat16),
    ],
    ids=lambda x: x if isinstance(x, str) else gpu_host.name_of(x),
)
def test_summaries_equal_the_oracle_in_any_order(limits: str, dtype: torch.dtype) -> None:
    architecture = OLDEST_ARCHITECTURE if limits == "T4" else SUITE_ARCHITECTURE
    for name, problem in SUMMARIES.items():
        runner = gpu_host.PtxRunner(architecture, limits=LIMITS[limits], resident=1)
        expected = assert_summaries(runner, problem, dtype)
        runner.resident = 0
        for runner.order in ("reversed", "shuffled"):
            found = summaries_of(runner, make(problem, dtype))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (name, runner.order)


# ---- executed instructions ----


class Budget(NamedTuple):
    """Counts for one element; traffic in bytes, between the threads and memory or the caches in front of it."""

    instructions: float
    mufu: float
    traffic: float


def _spent(executed: Counter[str], elements: int) -> Budget:
    """The counts of a kernel, without moves between registers, which the assembler removes."""

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


class Load(NamedTuple):
    """A problem, and the device that it is planned for."""

    problem: Problem
    limits: dict[str, int]
    chunk_tiles: int  # of backward, whose tiles are the smaller ones


LOADS = {
    "few_columns": Load(Problem(B=33, T=512, C=64), gpu_host.H100, 1),
    # The sequences fill a device of this few multiprocessors, as a large problem fills any.
    "full": Load(Problem(B=33, T=2048, C=64), {**gpu_host.H100, "multiprocessors": 4}, 8),
    "gated": Load(Problem(B=33, T=512, C=64, gated=True), gpu_host.H100, 1),
    # Of as many steps, which no boundary divides within a tile.
    "packed": Load(Problem(C=64, lengths=(512,) * 33), gpu_host.H100, 1),
    "gated_and_packed": Load(Problem(C=64, lengths=(512,) * 33, gated=True), gpu_host.H100, 1),
    # Most tiles are not full, and a part of the blocks has no steps.
    "short": Load(Problem(C=64, lengths=(96, 32) * 132, gated=True), gpu_host.H100, 1),
}

# 2% above the counts. Traffic: three tensors forward, five backward; checkpoints every 64 steps; messages, written once
# and read, from the cache, by the chunks up to the next anchor.
BUDGETS = {
    ("forward", "few_columns", "bfloat16"): Budget(28.6, 2.13, 6.30),
    ("forward", "few_columns", "float32"): Budget(27.2, 2.16, 12.49),
    ("forward", "full", "bfloat16"): Budget(27.9, 2.13, 6.25),
    ("forward", "full", "float32"): Budget(25.1, 2.13, 12.25),
    ("backward", "few_columns", "bfloat16"): Budget(69.7, 2.43, 11.49),
    ("backward", "few_columns", "float32"): Budget(66.1, 2.43, 21.49),
    ("backward", "full", "bfloat16"): Budget(64.0, 2.34, 10.46),
    ("backward", "full", "float32"): Budget(60.5, 2.34, 20.46),
    # Nothing of the gate.
    ("mixing_forward", "packed", "bfloat16"): Budget(29.7, 2.13, 6.35),
    ("mixing_forward", "packed", "float32"): Budget(28.3, 2.16, 12.58),
    # One tensor more forward and two backward.
    ("mixing_forward", "gated", "bfloat16"): Budget(39.0, 3.15, 8.30),
    ("mixing_forward", "gated", "float32"): Budget(37.0, 3.18, 16.49),
    ("mixing_forward", "gated_and_packed", "bfloat16"): Budget(39.4, 3.15, 8.35),
    ("mixing_forward", "gated_and_packed", "float32"): Budget(37.3, 3.18, 16.58),
    ("mixing_forward", "short", "bfloat16"): Budget(47.6, 3.30, 9.16),
    ("mixing_forward", "short", "float32"): Budget(45.3, 3.30, 17.16),
    ("mixing_backward", "packed", "bfloat16"): Budget(72.3, 2.43, 11.60),
    ("mixing_backward", "packed", "float32"): Budget(68.6, 2.43, 21.60),
    ("mixing_backward", "gated", "bfloat16"): Budget(88.6, 3.45, 15.49),
    ("mixing_backward", "gated", "float32"): Budget(84.2, 3.45, 29.49),
    ("mixing_backward", "gated_and_packed", "bfloat16"): Budget(88.9, 3.45, 15.60),
    ("mixing_backward", "gated_and_packed", "float32"): Budget(84.5, 3.45, 29.60),
    ("mixing_backward", "short", "bfloat16"): Budget(102.6, 3.58, 15.75),
    ("mixing_backward", "short", "float32"): Budget(98.0, 3.58, 29.75),
    # Two tensors; three, with a gate four.
    ("summary", "few_columns", "bfloat16"): Budget(17.1, 1.08, 4.11),
    ("summary", "few_columns", "float32"): Budget(16.9, 1.10, 8.31),
    ("summary", "gated", "bfloat16"): Budget(17.1, 1.08, 4.11),
    ("summary", "gated", "float32"): Budget(16.9, 1.10, 8.31),
    ("summary", "full", "bfloat16"): Budget(16.0, 1.07, 4.07),
    ("summary", "full", "float32"): Budget(14.7, 1.08, 8.07),
    ("adjoint_summary", "few_columns", "bfloat16"): Budget(52.9, 2.36, 7.32),
    ("adjoint_summary", "few_columns", "float32"): Budget(50.5, 2.36, 13.32),
    ("adjoint_summary", "full", "bfloat16"): Budget(46.9, 2.27, 6.43),
    ("adjoint_summary", "full", "float32"): Budget(44.4, 2.27, 12.43),
    ("adjoint_summary", "gated", "bfloat16"): Budget(64.1, 3.38, 9.32),
    ("adjoint_summary", "gated", "float32"): Budget(61.1, 3.38, 17.32),
    # Two, three, three and five tensors, of which a gate adds one, one and two, and the table's row, which every warp
    # reads; `bi_join` of forward and of backward.
    ("bi_sums", "whole_intervals", "bfloat16"): Budget(14.8, 1.09, 4.53),
    ("bi_sums", "whole_intervals", "float32"): Budget(16.8, 1.10, 8.61),
    ("bi_sums", "gated_intervals", "bfloat16"): Budget(14.8, 1.09, 4.53),
    ("bi_sums", "gated_intervals", "float32"): Budget(16.8, 1.10, 8.61),
    ("bi_forward", "whole_intervals", "bfloat16"): Budget(29.1, 2.14, 7.02),
    ("bi_forward", "whole_intervals", "float32"): Budget(35.5, 2.14, 13.90),
    ("bi_forward", "gated_intervals", "bfloat16"): Budget(39.1, 3.16, 9.06),
    ("bi_forward", "gated_intervals", "float32"): Budget(46.2, 3.16, 17.98),
    ("bi_adjoint_sums", "whole_intervals", "bfloat16"): Budget(38.1, 2.19, 7.40),
    ("bi_adjoint_sums", "whole_intervals", "float32"): Budget(44.2, 2.16, 14.28),
    ("bi_adjoint_sums", "gated_intervals", "bfloat16"): Budget(49.2, 3.21, 9.44),
    ("bi_adjoint_sums", "gated_intervals", "float32"): Budget(55.9, 3.18, 18.36),
    ("bi_backward", "whole_intervals", "bfloat16"): Budget(73.3, 2.40, 13.52),
    ("bi_backward", "whole_intervals", "float32"): Budget(71.9, 2.40, 23.72),
    ("bi_backward", "gated_intervals", "bfloat16"): Budget(90.3, 3.42, 17.60),
    ("bi_backward", "gated_intervals", "float32"): Budget(88.5, 3.42, 31.88),
    ("bi_join", "whole_intervals", "bfloat16"): Budget(3.7, 0.07, 1.57),
    ("bi_join", "whole_intervals", "float32"): Budget(3.7, 0.07, 1.57),
    ("bi_join", "gated_intervals", "bfloat16"): Budget(3.7, 0.07, 1.57),
    ("bi_join", "gated_intervals", "float32"): Budget(3.7, 0.07, 1.57),
}


def _counts(load: Load, dtype: torch.dtype) -> dict[str, Budget]:
    """The counts of each kernel of the operator and its gradient."""
    executed: dict[str, Counter[str]] = {}
    problem, limits, _ = load
    runner = gpu_host.PtxRunner(SUITE_ARCHITECTURE, counted=executed, limits=limits)
    with emulated_backend.emulated(runner) as backend:
        tensors = make(problem, dtype)
        solve(tensors, backend)
    if problem.lengths is None:
        summaries_of(runner, tensors)
    elements = tensors.k.numel()
    return {kernel: _spent(counts, elements) for kernel, counts in executed.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=gpu_host.name_of)
@pytest.mark.parametrize("load", LOADS)
def test_a_kernel_keeps_to_its_budget(load: str, dtype: torch.dtype) -> None:
    problem, limits, chunk_tiles = LOADS[load]
    if problem.lengths is None:
        assert plan_of("backward", dtype, problem, limits)["chunk_tiles"] == chunk_tiles
    assert_within_budget(_counts(LOADS[load], dtype), load, dtype)


def assert_within_budget(counts: dict[str, Budget], load: str, dtype: torch.dtype) -> None:
    name = gpu_host.name_of(dtype)
    for kernel, spent in counts.items():
        print(f"{kernel} {load} {name}", *(f"{value:.3f}" for value in spent))
    for kernel in counts.keys() - {"reduce"}:
        spent, budget = counts[kernel], BUDGETS[kernel, load, name]
        assert all(value <= limit for value, limit in zip(spent, budget, strict=True)), (kernel, spent, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=gpu_host.name_of)
def test_a_kernel_of_both_directions_keeps_to_its_budget(dtype: torch.dtype) -> None:
    for load, gated in (("whole_intervals", False), ("gated_intervals", True)):
        executed: dict[str, Counter[str]] = {}
        tensors = bi_problems.make(Problem(B=2, T=512, C=64, gated=gated), dtype)
        with emulated_backend.emulated(gpu_host.PtxRunner(SUITE_ARCHITECTURE, counted=executed)) as backend:
            bi_problems.solve_by(tensors, backend)
        counts = {kernel: _spent(times, tensors.k.numel()) for kernel, times in executed.items()}
        assert_within_budget(counts, load, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=gpu_host.name_of)
@pytest.mark.parametrize(("kernel", "most"), [("forward", 1.63), ("backward", 1.63)])
def test_keys_that_spread_cost_less_than_twice_as_much(kernel: str, most: float, dtype: torch.dtype) -> None:
    usual, spread = (
        _counts(Load(Problem(T=512, C=64, k_scale=k_scale), gpu_host.H100, 1), dtype)[kernel].instructions
        for k_scale in (1.0, 20.0)
    )
    print(f"{kernel} {gpu_host.name_of(dtype)} {spread / usual:.2f}")
    assert spread <= most * usual
