"""Many random problems, and many runs of the same one."""

import random

import pytest
import torch
from problems import Problem, assert_solves, dtypes_of, make, solve

pytestmark = pytest.mark.stress


def random_problem(draw: random.Random, longest: int, widest: int) -> Problem:
    """Lengths and widths are drawn by their logarithm, so that small and large ones are equally frequent."""
    return Problem(
        B=draw.choice([1, 1, 2, 3, 7]),
        T=int(longest ** draw.random()),
        C=int(widest ** draw.random()),
        k_scale=draw.choice([0.1, 1.0, 10.0]),
        log_decay=draw.choice([None, None, -1e-3, -20.0]),
        u=draw.choice([None, None, -30.0, 30.0]),
        with_state=draw.random() < 0.5,
        layout=draw.choice(["contiguous", "contiguous", "transposed", "time_major", "every_second_channel"]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_random_problem_equals_the_oracle(seed: int, compiled_backend: str) -> None:
    draw = random.Random(seed)
    problem, dtype = random_problem(draw, 300, 200), draw.choice(dtypes_of(compiled_backend))
    assert_solves(make(problem, dtype, seed), compiled_backend)


@pytest.mark.parametrize(("B", "T", "C"), [(1, 5000, 33), (1, 700, 130), (5, 300, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thirty_runs_are_bitwise_equal(dtype: torch.dtype, B: int, T: int, C: int, compiled_backend: str) -> None:
    tensors = make(Problem(B=B, T=T, C=C, with_state=True), dtype)
    first = solve(tensors, compiled_backend)
    for run in range(29):
        for name, value in solve(tensors, compiled_backend).items():
            assert torch.equal(value, first[name]), (run, name)
