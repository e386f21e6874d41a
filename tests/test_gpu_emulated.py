"""The GPU kernels' phases on the host: in any order of threads and blocks, without a GPU or a CUDA toolkit."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import bi_problems
import pytest
import torch
from problems import MIXING_PROBLEMS, PROBLEMS, Problem, assert_solves, log_denominator, make, solve
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.inputs import DTYPES

_introspection = pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")
gpu_host = pytest.importorskip("gpu_host")
emulated_backend = pytest.importorskip("emulated_backend")

HERE = Path(__file__).parent

# So little shared memory that forward has tiles of one warp: even short sequences have many chunks.
SMALL_TILES = {**gpu_host.ONE_MULTIPROCESSOR, "shared_per_block": 98304, "shared_per_multiprocessor": 1}
LIMITS = {
    "H100": gpu_host.H100,
    "T4": gpu_host.T4,
    "one_multiprocessor": gpu_host.ONE_MULTIPROCESSOR,
    "small_tiles": SMALL_TILES,
}

# With so many sequences one multiprocessor gets chunks of several tiles, the last of which is not whole.
SEVERAL_TILES = Problem(B=16, T=1034, C=35, with_state=True)


def plan_of(operation: str, dtype: torch.dtype, problem: Problem, limits: dict[str, int]) -> dict[str, Any]:
    given = (operation, gpu_host.name_of(dtype), problem.B, problem.T, problem.C, limits)
    return _introspection.plan_cuda(*given)  # type: ignore[no-any-return]


def _run_suite(**environment: str) -> None:
    files = [str(HERE / f"test_{name}.py") for name in ("operator", "mixing", "state", "special_values")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated_backend", *files, "-k", "emulated"],
        env={**os.environ, **environment, "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


def test_the_suite_passes_on_the_emulated_kernels() -> None:
    _run_suite()


def test_the_suite_passes_on_one_multiprocessor() -> None:
    _run_suite(WKV_TEST_MULTIPROCESSORS="1")


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", LIMITS)
def test_every_plan_equals_the_oracle(limits: str, dtype: torch.dtype) -> None:
    with emulated_backend.emulated(gpu_host.Emulator("shuffled", limits=LIMITS[limits])) as backend:
        for problem in PROBLEMS.values():
            assert_solves(make(problem, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["one_multiprocessor", "small_tiles"])
def test_chunks_of_several_tiles_equal_the_oracle(limits: str, dtype: torch.dtype) -> None:
    if dtype != torch.float64:
        for operation in ("forward", "backward"):
            plan = plan_of(operation, dtype, SEVERAL_TILES, LIMITS[limits])
            assert plan["chunk_tiles"] > 1 and plan["chunks"] > 1 and plan["anchor"] == 1
    with emulated_backend.emulated(gpu_host.Emulator("shuffled", limits=LIMITS[limits])) as backend:
        assert_solves(make(SEVERAL_TILES, dtype), backend)
        spread = Problem(B=16, T=1034, C=3, k_scale=20.0, with_state=True)
        assert_solves(make(spread, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", LIMITS)
def test_the_order_of_threads_and_blocks_changes_no_bit(limits: str, dtype: torch.dtype) -> None:
    for problem in (Problem(B=2, T=700, C=70, with_state=True), SEVERAL_TILES):
        tensors = make(problem, dtype)
        with emulated_backend.emulated(gpu_host.Emulator(limits=LIMITS[limits])) as backend:
            expected = solve(tensors, backend)
        for order, seed in [("reversed", 0), ("shuffled", 1), ("shuffled", 2), ("shuffled", 3)]:
            with emulated_backend.emulated(gpu_host.Emulator(order, seed, limits=LIMITS[limits])) as backend:
                for name, value in solve(tensors, backend).items():
                    assert torch.equal(value, expected[name]), (order, seed, name)


# More chunks than from one anchor to the next, and not so many columns that each chunk is an anchor.
OVER_ANCHORS = {
    "one_sequence": Problem(B=1, T=3000, C=3, log_decay=-1e-3, with_state=True),
    "many_sequences": Problem(B=44, T=2600, C=3, with_state=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("problem", OVER_ANCHORS)
@pytest.mark.parametrize("limits", ["H100", "T4"])
def test_states_pass_through_many_chunks(limits: str, problem: str, dtype: torch.dtype) -> None:
    given = OVER_ANCHORS[problem]
    if dtype != torch.float64:
        for operation in ("forward", "backward"):
            plan = plan_of(operation, dtype, given, LIMITS[limits])
            assert plan["chunk_tiles"] == 1 < plan["anchor"] < plan["chunks"] - 1
    with emulated_backend.emulated(gpu_host.Emulator("shuffled", limits=LIMITS[limits])) as backend:
        assert_solves(make(given, dtype), backend)


@pytest.mark.parametrize("max_in", [0.0, 1.5e7, -1.5e7, 1.6e7, 3e7, 1e30])
@pytest.mark.parametrize("den", [2.0**-126, 1.0, 1.75 * 2.0**127])
def test_the_largest_sums_and_exponents_pass_through_many_chunks(den: float, max_in: float) -> None:
    """With keys of -inf and no decay a state stays what it is, wherever its sums and its max are."""
    k, v = torch.full((1, 1000, 2), -torch.inf), torch.zeros(1, 1000, 2)
    w, u = torch.full((2,), -100.0), torch.zeros(2)
    state = torch.tensor([[-0.75 * den, 0.25 * den], [den, den], [max_in, max_in]])[None]
    y, once, _ = gpu_host.forward(gpu_host.Emulator(), w, u, k[:, :1], v[:, :1], state, False)
    several, many, _ = gpu_host.forward(gpu_host.Emulator(), w, u, k, v, state, False)
    mean = torch.tensor([-0.75, 0.25])
    for ratio in (y, several, once[:, 0] / once[:, 1]):
        torch.testing.assert_close(ratio, mean.expand(ratio.shape), rtol=2**-22, atol=0)
    torch.testing.assert_close(log_denominator(once), log_denominator(state), rtol=2**-22, atol=1e-5)
    assert torch.equal(many, once)


# ---- gates and packed sequences ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["T4", "one_multiprocessor", "small_tiles"])
def test_gates_and_packed_sequences_equal_the_oracle_in_other_plans(limits: str, dtype: torch.dtype) -> None:
    with emulated_backend.emulated(gpu_host.Emulator("shuffled", limits=LIMITS[limits])) as backend:
        for problem in MIXING_PROBLEMS.values():
            assert_solves(make(problem, dtype), backend)
        several_tiles = replace(SEVERAL_TILES, C=3, gated=True)
        assert_solves(make(several_tiles, dtype), backend)
        assert_solves(make(replace(several_tiles, k_scale=20.0), dtype), backend)


# With more chunks than from one anchor to the next, beside sequences of one chunk and of none.
LONG_AMONG_SHORT = Problem(C=5, lengths=(3, 0, 2100, 64, 1, 0, 700), gated=True, with_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
def test_a_long_sequence_among_short_ones_passes_through_many_chunks(dtype: torch.dtype) -> None:
    with emulated_backend.emulated(gpu_host.Emulator("shuffled")) as backend:
        assert_solves(make(LONG_AMONG_SHORT, dtype), backend, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["H100", "small_tiles"])
def test_the_order_of_threads_and_blocks_changes_no_bit_of_mixing(limits: str, dtype: torch.dtype) -> None:
    for problem in (replace(LONG_AMONG_SHORT, lengths=(1, 0, 400, 65)), Problem(B=2, T=300, C=70, gated=True)):
        tensors = make(problem, dtype)
        with emulated_backend.emulated(gpu_host.Emulator(limits=LIMITS[limits])) as backend:
            expected = solve(tensors, backend)
        for order, seed in [("reversed", 0), ("shuffled", 1)]:
            with emulated_backend.emulated(gpu_host.Emulator(order, seed, limits=LIMITS[limits])) as backend:
                for name, value in solve(tensors, backend).items():
                    assert torch.equal(value, expected[name]), (order, seed, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
def test_a_packed_sequence_is_bit_for_bit_what_it_is_alone(dtype: torch.dtype) -> None:
    """Where the plan is the same: the sequences are as long as the largest tile, and few."""
    lengths, interval = (300, 517, 256), 128 if dtype == torch.float64 else 64
    x = make(Problem(C=67, lengths=lengths, gated=True, with_state=True), dtype)
    assert x.state is not None and x.cu_seqlens is not None and x.r is not None
    run = gpu_host.Emulator("shuffled")
    y, states, checkpoints = gpu_host.forward(run, *x.inputs, x.r, x.cu_seqlens, True)
    packed = gpu_host.backward(run, *x.inputs, x.r, x.cu_seqlens, checkpoints, x.gy, x.gstate)
    for n, length in enumerate(lengths):
        begin = int(x.cu_seqlens[n])
        own = slice(begin, begin + length)
        k, v, r, gy = (z[:, own] for z in (x.k, x.v, x.r, x.gy))
        row = begin // interval + n
        rows = checkpoints[:, row : row + -(-length // interval)]
        given = (x.w, x.u, k, v, x.state[n : n + 1], r, None)
        alone = gpu_host.forward(run, *given, True)
        for a, b in zip(alone, (y[:, own], states[n : n + 1], rows), strict=True):
            assert torch.equal(a, b)
        _, _, gk, gv, gstate, gr = gpu_host.backward(run, *given, rows, gy, x.gstate[n : n + 1])
        for a, b in zip((gk, gv, gr), (packed[2], packed[3], packed[5]), strict=True):
            assert torch.equal(a, b[:, own])
        assert torch.equal(gstate, packed[4][n : n + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=gpu_host.name_of)
def test_an_open_gate_changes_no_bit(dtype: torch.dtype) -> None:
    x = make(Problem(B=2, T=300, C=70, with_state=True), dtype)
    run, r = gpu_host.Emulator("shuffled"), torch.full_like(x.k, torch.inf)
    plain = gpu_host.forward(run, *x.inputs, True)
    gated = gpu_host.forward(run, *x.inputs, r, None, True)
    gradients = gpu_host.backward(run, *x.inputs, plain[2], x.gy, x.gstate)
    *of_gated, gr = gpu_host.backward(run, *x.inputs, r, None, plain[2], x.gy, x.gstate)
    for a, b in zip((*plain, *gradients), (*gated, *of_gated), strict=True):
        assert torch.equal(a, b)
    assert not gr.any()


def test_packed_sequences_may_be_more_than_a_side_of_a_grid() -> None:
    tensors = make(Problem(C=1, lengths=(1,) * 33_000 + (0, 2), with_state=True, gated=True))
    with emulated_backend.emulated(gpu_host.Emulator(limits=gpu_host.T4)) as backend:
        assert_solves(tensors, backend, exact_backend="cpu")


def bad_boundaries(total: int, seed: int) -> list[Tensor]:
    """Of up to 40 sequences: in the wrong order, beyond the ends, and as far as numbers go."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, N: int) -> Tensor:
        return torch.randint(low, high, (N + 1,), generator=draw)

    extremes = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 2**31, 2**32 + 3, total])
    return [
        boundaries
        for N in (1, 2, 7, 40)
        for boundaries in (
            integers(0, total + 1, N),
            integers(-5, total + 6, N).int(),
            extremes[integers(0, len(extremes), N)],
        )
    ]


def run_bad_boundaries(executor: Any, dtype: torch.dtype, total: int, seed: int) -> None:
    """Such a call ends, and touches nothing outside its tensors; what it returns is anything."""
    for cu_seqlens in bad_boundaries(total, seed):
        x = make(Problem(B=1, T=total, C=6, gated=True), dtype)
        N = cu_seqlens.shape[0] - 1
        state = torch.rand(N, 3, 6, dtype=x.gstate.dtype)
        given = (x.w, x.u, x.k, x.v, state, x.r, cu_seqlens)
        _, _, checkpoints = gpu_host.forward(executor, *given, True)
        gpu_host.backward(executor, *given, torch.rand_like(checkpoints), x.gy, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["H100", "small_tiles"])
def test_boundaries_that_are_none_end_and_touch_nothing_else(limits: str, dtype: torch.dtype) -> None:
    for seed, total in enumerate((1, 64, 300, 701)):
        run_bad_boundaries(gpu_host.Emulator("shuffled", seed, limits=LIMITS[limits]), dtype, total, seed)


# ---- barriers ----

# Phases, each of which ends with a barrier of the warp or of the block: those of the block that starts last of its
# column and waits for others.
BEGIN = ["take a ticket and stage", "wait for copies"]
STAGE_AGAIN = ["stage"]  # another tile than foreseen, or the next one
RANGE = ["bring keys to registers", "leave the largest key", "agree on a scale"]
FORWARD = [*RANGE, "sum and leave sums"]
BACKWARD = [*RANGE, "replay", "reverse", "leave sums"]
LOOK_BACK = ["sum up and wait for messages", "join", "correct"]
# Where every chunk is an anchor.
LOOK_BACK_FORWARD = ["sum up and wait for messages", "join one message", "correct"]
LOOK_BACK_BACKWARD = ["sum up and wait for one message", "join", "correct"]
# The tiles of a chunk after the first one.
GO_ON_FORWARD = ["sum up alone", "join alone", "correct"]
GO_ON_BACKWARD = ["sum up alone", "join", "correct"]

UNTRIED = {
    "take a ticket and stage": "without a ticket a block does not know its chunk",
    "unstage": "the emulation would run it in the next tile, as if it belonged to that one",
}
UNNOTICED = {
    "wait for copies": "on the host a copy lands at once, and the barrier behind `stage` separates lanes",
    "join one message": "forward's one message already lies in the place of the state before the tile",
    "sum up and wait for one message": "backward's one message is joined by the threads that waited for it",
    "sum up alone": "the threads that join have summed up the tile themselves",
    "join alone": "the state before the tile is unchanged, and other barriers precede its use by the next tile",
    "agree on a scale": "the emulation reads the votes after all threads have voted: the barrier is in the vote",
}


class Scenario(NamedTuple):
    problem: Problem
    limits: dict[str, int]
    block_order: str
    barriers: dict[str, list[str]]  # of each kernel


LOOKING_BACK_FAR = Problem(B=1, T=768, C=64, with_state=True)
SCENARIOS = {
    "staged_as_foreseen": Scenario(
        LOOKING_BACK_FAR,
        gpu_host.H100,
        "forward",
        {
            "forward": [*BEGIN, *FORWARD, *LOOK_BACK],
            "backward": [*BEGIN, *BACKWARD, *LOOK_BACK, "unstage"],
            "reduce": ["sum rows"],
        },
    ),
    "staged_again": Scenario(
        LOOKING_BACK_FAR,
        gpu_host.H100,
        "reversed",
        {
            "forward": [BEGIN[0], *STAGE_AGAIN, *FORWARD, *LOOK_BACK],
            "backward": [BEGIN[0], *STAGE_AGAIN, *BACKWARD, *LOOK_BACK, "unstage"],
        },
    ),
    "several_tiles": Scenario(
        Problem(B=16, T=1024, C=64, with_state=True),
        gpu_host.ONE_MULTIPROCESSOR,
        "forward",
        {
            "forward": [
                *[*BEGIN, *FORWARD, *LOOK_BACK_FORWARD, "unstage"],
                *[*STAGE_AGAIN, *FORWARD, *GO_ON_FORWARD],
            ],
            "backward": [
                *[*BEGIN, *BACKWARD, *LOOK_BACK_BACKWARD, "unstage"],
                *7 * [*STAGE_AGAIN, *BACKWARD, *GO_ON_BACKWARD, "unstage"],
            ],
        },
    ),
}


@pytest.mark.parametrize(
    ("scenario", "kernel"),
    [(scenario, kernel) for scenario, given in SCENARIOS.items() for kernel in given.barriers],
)
def test_a_missing_barrier_is_noticed(scenario: str, kernel: str) -> None:
    problem, limits, block_order, of_kernels = SCENARIOS[scenario]
    barriers = of_kernels[kernel]
    tensors = make(problem, torch.bfloat16)
    w, u, k, v, state = tensors.inputs
    assert k is not None and v is not None
    # Aligned differently to 16 bytes than the outputs, so that other threads stage them than unstage those.
    k, v = (torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (k, v))
    checkpoints = gpu_host.forward(gpu_host.Emulator(limits=limits), w, u, k, v, state, True)[2]

    def run(order: str, dropped: int | None) -> tuple[Tensor, ...]:
        emulator = gpu_host.Emulator(order, 1, None if dropped is None else (kernel, dropped), limits, block_order)
        if kernel == "forward":
            return gpu_host.forward(emulator, w, u, k, v, state, True)  # type: ignore[no-any-return]
        given = (w, u, k, v, state, checkpoints, tensors.gy, tensors.gstate)
        return gpu_host.backward(emulator, *given)  # type: ignore[no-any-return]

    def is_noticed(barrier: int) -> bool:
        found = (run(order, barrier) for order in ("forward", "reversed", "shuffled"))
        return any(not torch.equal(a, b) for results in found for a, b in zip(results, expected, strict=True))

    expected = run("forward", None)
    assert gpu_host.library().barriers_of_last_block(kernel.encode()) == len(barriers)
    tried = [barrier for barrier, name in enumerate(barriers) if name not in UNTRIED]
    wrong = [barrier for barrier in tried if is_noticed(barrier) != (barriers[barrier] not in UNNOTICED)]
    assert [f"{barrier}, behind `{barriers[barrier]}`" for barrier in wrong] == []


BI_READ = ["find the interval", "stage", "leave the largest key", "agree on a scale", "sum and leave sums"]
BI_ADJOINTS = [*BI_READ, "sum up adjoints", "leave adjoints"]
BI_BARRIERS = {
    "bi_sums": ["find the interval", "stage"],
    "bi_forward": [*BI_READ, "read"],
    "bi_adjoint_sums": BI_ADJOINTS,
    "bi_backward": [*BI_ADJOINTS, "differentiate", "unstage and leave partials"],
}


@pytest.mark.parametrize("kernel", BI_BARRIERS)
def test_a_missing_barrier_of_both_directions_is_noticed(kernel: str) -> None:
    barriers = BI_BARRIERS[kernel]
    given = bi_problems.make(Problem(B=1, T=192, C=64, gated=True, log_decay=-0.05), torch.bfloat16)
    # Aligned differently to 16 bytes than the outputs, as above.
    k, v = (torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (given.k, given.v))
    inputs = given.log_decay, given.u, k, v, given.r, None
    _, checkpoints = gpu_host.bi_forward(gpu_host.Emulator(), *inputs, True)

    def run(order: str, dropped: int | None) -> tuple[Tensor, ...]:
        emulator = gpu_host.Emulator(order, 1, None if dropped is None else (kernel, dropped))
        if kernel in ("bi_sums", "bi_forward"):
            return gpu_host.bi_forward(emulator, *inputs, True)  # type: ignore[no-any-return]
        return gpu_host.bi_backward(emulator, *inputs, checkpoints, given.gy)  # type: ignore[no-any-return]

    def is_noticed(barrier: int) -> bool:
        found = (run(order, barrier) for order in ("forward", "reversed", "shuffled"))
        return any(not torch.equal(a, b) for results in found for a, b in zip(results, expected, strict=True))

    expected = run("forward", None)
    assert gpu_host.library().barriers_of_last_block(kernel.encode()) == len(barriers)
    # Without its place a block reads anywhere.
    wrong = [i for i in range(1, len(barriers)) if is_noticed(i) != (barriers[i] not in UNNOTICED)]
    assert [f"{i}, behind `{barriers[i]}`" for i in wrong] == []


# ---- inputs ----


def test_a_batch_may_be_larger_than_a_grid() -> None:
    tensors = make(Problem(B=65_540, T=2, C=1, with_state=True))
    with emulated_backend.emulated(gpu_host.Emulator()) as backend:
        assert_solves(tensors, backend, exact_backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=gpu_host.name_of)
def test_parameters_may_have_any_dtype(parameter_dtype: torch.dtype, dtype: torch.dtype) -> None:
    w, u, k, v, state = make(Problem(B=1, T=20, C=5, with_state=True), dtype).inputs
    assert w is not None and u is not None and k is not None and v is not None and state is not None
    w, u = w.to(parameter_dtype), u.to(parameter_dtype)
    y, _, _ = gpu_host.forward(gpu_host.Emulator(), w, u, k, v, state, False)
    exact, _ = rwkv_kernels.reference.wkv(*(x.double() for x in (w, u, k, v, state)))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max()))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
def test_a_step_moves_a_state_of_any_layout_in_place(dtype: torch.dtype, layout: str) -> None:
    w, u, k, v, state = make(Problem(B=3, T=6, C=70, with_state=True), dtype).inputs
    assert w is not None and u is not None and k is not None and v is not None and state is not None
    state[1, 1] = 0  # empty, for any num and max
    exact, after = rwkv_kernels.reference.wkv(*(x.double() for x in (w, u, k, v, state)))
    moved = {
        "contiguous": state.clone(),
        "transposed": state.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": torch.stack((state, state), -1)[..., 0],
    }[layout]
    for t in range(6):
        y = gpu_host.step(gpu_host.Emulator(), w, u, k[:, t], v[:, t], moved)
        torch.testing.assert_close(
            y.double(), exact[:, t], rtol=0, atol=8 * torch.finfo(dtype).eps * float(exact.abs().max())
        )
    torch.testing.assert_close(log_denominator(moved).double(), log_denominator(after), rtol=1e-5, atol=1e-5)
