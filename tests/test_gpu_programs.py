"""The GPU kernels' programs on the host: their phases in any order of threads, without a GPU or a CUDA toolkit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DTYPES, PROBLEMS, Problem, assert_solves, log_denominator, make, solve
from torch import Tensor

import rwkv_kernels

_introspection = pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")
gpu_programs = pytest.importorskip("gpu_programs")
emulated_backend = pytest.importorskip("emulated_backend")

HERE = Path(__file__).parent

# What is asked of the forward and of the backward plan; backward's tiles are as long as a checkpoint's interval.
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "automatic": ({}, {}),
    "serial": ({"schedule": "serial"}, {"schedule": "serial"}),
    "serial_single_spans": ({"schedule": "serial", "spans": 1}, {"schedule": "serial"}),
    "chunked": ({"schedule": "chunked"}, {"schedule": "chunked"}),
    "chunks_of_three_spans": ({"spans": 3, "chunk_len": 96}, {"schedule": "chunked"}),
    "chunks_of_several_tiles": ({"spans": 1, "chunk_len": 64}, {"chunk_len": 128}),
    "single_pass": ({"schedule": "single_pass"}, {"schedule": "single_pass"}),
    "single_pass_of_small_tiles": ({"schedule": "single_pass", "spans": 1}, {"schedule": "single_pass"}),
    # Every chunk ends at a checkpoint.
    "single_pass_of_two_spans": ({"schedule": "single_pass", "spans": 2}, {"schedule": "single_pass"}),
}


def plans_for(dtype: torch.dtype) -> list[str]:
    """A single pass needs a warp for the lanes of a span, which float64 does not have."""
    return [name for name in PLANS if dtype != torch.float64 or "single_pass" not in name]


PLANS_AND_DTYPES = [
    pytest.param(plan, dtype, id=f"{plan}-{gpu_programs.name_of(dtype)}")
    for dtype in DTYPES
    for plan in plans_for(dtype)
]


@pytest.fixture(scope="session")
def library() -> Any:
    return gpu_programs.compile_emulator()


@contextmanager
def _emulated(library: Any, plan: str = "automatic", **emulator: Any) -> Iterator[str]:
    with emulated_backend.emulated(gpu_programs.Emulator(library, **emulator), *PLANS[plan]) as name:
        yield name


def _run_suite(*names: str, which: str = "emulated", **environment: str) -> None:
    files = [str(HERE / f"test_{name}.py") for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated_backend", *files, "-k", which],
        env={**os.environ, **environment, "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


def test_the_suite_passes_on_the_emulated_kernels() -> None:
    _run_suite("operator", "state", "special_values")


@pytest.mark.parametrize("plan", ["serial_single_spans", "single_pass_of_small_tiles"])
def test_special_values_pass_through_rings_and_from_chunk_to_chunk(plan: str) -> None:
    _run_suite("special_values", which="emulated and not float64", WKV_TEST_PLANS=json.dumps(PLANS[plan]))


@pytest.mark.parametrize(("plan", "dtype"), PLANS_AND_DTYPES)
def test_every_schedule_equals_the_oracle(plan: str, dtype: torch.dtype, library: Any) -> None:
    for name in ("two_checkpoints_and_one", "slow_decay", "strong_decay", "u_of_plus_50", "k_of_20", "wide"):
        tensors = make(PROBLEMS[name], dtype)
        with _emulated(library, plan) as backend:
            assert_solves(tensors, backend)


# The more sequences, the smaller the groups of chunks that hand over together.
GROUPS_OF_CHUNKS = {
    "of_32": Problem(B=1, T=2400, C=3, with_state=True),
    "of_3": Problem(B=44, T=420, C=3, with_state=True),
    "of_1": Problem(B=140, T=300, C=2, with_state=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_programs.name_of)
@pytest.mark.parametrize("group", GROUPS_OF_CHUNKS)
@pytest.mark.parametrize("plan", ["single_pass_of_small_tiles", "single_pass_of_two_spans"])
def test_groups_of_chunks_hand_over(plan: str, group: str, dtype: torch.dtype, library: Any) -> None:
    problem = GROUPS_OF_CHUNKS[group]
    for operation, request in zip(("forward", "backward"), PLANS[plan], strict=True):
        made = _introspection.plan_cuda(
            operation, gpu_programs.name_of(dtype), problem.B, problem.T, problem.C, **request
        )
        assert f"of_{made['group']}" == group and made["group"] < made["chunks"] - 1
    with _emulated(library, plan) as backend:
        assert_solves(make(problem, dtype), backend)


@pytest.mark.parametrize(("plan", "dtype"), PLANS_AND_DTYPES)
def test_the_order_of_threads_changes_no_bit(plan: str, dtype: torch.dtype, library: Any) -> None:
    tensors = make(Problem(B=2, T=300, C=70, with_state=True), dtype)
    with _emulated(library, plan) as backend:
        expected = solve(tensors, backend)
    for order, seed in [("reversed", 0), ("shuffled", 1), ("shuffled", 2)]:
        with _emulated(library, plan, order=order, seed=seed) as backend:
            for name, value in solve(tensors, backend).items():
                assert torch.equal(value, expected[name]), (order, seed, name)


TWO_TILES = {"spans": 2, "chunk_len": 128}
SINGLE_PASS = {"spans": 2, "schedule": "single_pass"}
RING = {"spans": 1, "schedule": "serial"}


# The barriers of two tiles. Behind the last phase of a program nothing follows; and where nothing is written, the phase
# that ends a tile touches nothing that the staging of the next one does.
@pytest.mark.parametrize(
    ("kernel", "plan", "barriers"),
    [
        ("forward", TWO_TILES, [0, 1, 2, 3, 4, 5, 6]),  # stage, summarise, walk, finish; stage, summarise, walk
        # Stage the first; stage the second, walk the first, finish; stage the third, walk the second, finish. On the
        # host copies land at once, and the barriers behind the wait for them, before a walk, keep nothing apart.
        ("forward", RING, [2, 3, 5, 6]),
        ("summarise_states", TWO_TILES, [0, 1, 3, 4]),  # stage, summarise; stage, summarise
        ("backward", TWO_TILES, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # stage, summarise, replay, reverse, finish; and again
        ("summarise_adjoints", TWO_TILES, [0, 1, 2, 4, 5, 6]),  # stage, summarise, replay; and again
        ("reduce", TWO_TILES, [0]),
        # Without the first barrier, that behind the block's place, a block would not know which memory is its own.
        ("forward_single_pass", SINGLE_PASS, [1, 2, 3, 4, 5]),  # stage, summarise, speak and listen, take, walk
        ("backward_single_pass", SINGLE_PASS, [1, 2, 3, 4, 5, 6]),  # which walks forward and back
    ],
)
def test_a_missing_barrier_is_caught(kernel: str, plan: dict[str, Any], barriers: list[int], library: Any) -> None:
    tensors = make(Problem(B=1, T=256, C=64, with_state=True), torch.bfloat16)
    w, u, k, v, state = tensors.inputs
    assert k is not None and v is not None
    # Elsewhere than the outputs in their 16 bytes, so that other threads bring them than take those away.
    k, v = (torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (k, v))

    def run(emulator: Any) -> list[Tensor]:
        y, state_out, checkpoints = gpu_programs.forward(emulator, w, u, k, v, state, True, **plan)
        given = (w, u, k, v, state, checkpoints, tensors.gy, tensors.gstate)
        return [y, state_out, checkpoints, *gpu_programs.backward(emulator, *given, **{**plan, "spans": None})]

    expected = run(gpu_programs.Emulator(library))
    for barrier in barriers:
        caught = False
        for order in ("forward", "reversed", "shuffled"):
            found = run(gpu_programs.Emulator(library, order, dropped_barrier=(kernel, barrier)))
            caught |= not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert caught, f"nothing changes without barrier {barrier}"


def test_a_batch_may_be_larger_than_a_grid(library: Any) -> None:
    tensors = make(Problem(B=65_540, T=2, C=1, with_state=True))
    with _emulated(library) as backend:
        assert_solves(tensors, backend, exact_backend="cpu")


@pytest.mark.parametrize("plan", ["chunked", "chunks_of_several_tiles", "single_pass_of_small_tiles"])
def test_many_chunks_are_carried(plan: str, library: Any) -> None:
    tensors = make(Problem(B=1, T=3000, C=3, log_decay=-1e-3, with_state=True))
    with _emulated(library, plan) as backend:
        assert_solves(tensors, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_programs.name_of)
@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=gpu_programs.name_of)
def test_parameters_may_have_any_dtype(parameter_dtype: torch.dtype, dtype: torch.dtype, library: Any) -> None:
    w, u, k, v, state = make(Problem(B=1, T=20, C=5, with_state=True), dtype).inputs
    assert w is not None and u is not None and k is not None and v is not None and state is not None
    w, u = w.to(parameter_dtype), u.to(parameter_dtype)
    y, _, _ = gpu_programs.forward(gpu_programs.Emulator(library), w, u, k, v, state, False)
    exact, _ = rwkv_kernels.reference.wkv(*(x.double() for x in (w, u, k, v, state)))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max()))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_programs.name_of)
def test_a_step_moves_a_state_of_any_layout_in_place(dtype: torch.dtype, layout: str, library: Any) -> None:
    w, u, k, v, state = make(Problem(B=3, T=6, C=70, with_state=True), dtype).inputs
    assert w is not None and u is not None and k is not None and v is not None and state is not None
    state[1, 1] = 0  # empty, whatever num and max say
    exact, after = rwkv_kernels.reference.wkv(*(x.double() for x in (w, u, k, v, state)))
    moved = {
        "contiguous": state.clone(),
        "transposed": state.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": torch.stack((state, state), -1)[..., 0],
    }[layout]
    for t in range(6):
        y = gpu_programs.step(gpu_programs.Emulator(library), w, u, k[:, t], v[:, t], moved)
        torch.testing.assert_close(
            y.double(), exact[:, t], rtol=0, atol=8 * torch.finfo(dtype).eps * float(exact.abs().max())
        )
    torch.testing.assert_close(log_denominator(moved).double(), log_denominator(after), rtol=1e-5, atol=1e-5)
