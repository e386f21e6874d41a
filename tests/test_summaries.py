"""Summaries of the steps of a slice, by every backend that has operators for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import MIXING_PROBLEMS, PROBLEMS, Problem, Tensors, assert_summaries_close, make
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.inputs import DTYPES

CASES = PROBLEMS | {name: problem for name, problem in MIXING_PROBLEMS.items() if problem.lengths is None}


@pytest.fixture
def find(operators: Any) -> Callable[[str], Any]:
    """The backend's operator of a name in which {} stands for its prefix."""
    prefix = operators.forward._schema.name.split("::")[1].removesuffix("_forward")
    return lambda name: getattr(torch.ops.rwkv_kernels, name.format(prefix)).default


def summaries_of(find: Callable[[str], Any], tensors: Tensors) -> tuple[Tensor, Tensor]:
    w, u, k, v, state = tensors.inputs
    *_, checkpoints = find("{}_mixing_forward")(w, u, k, v, state, tensors.r, None, True)
    adjoint = find("_{}_adjoint_summary")(w, u, k, v, state, tensors.r, checkpoints, tensors.gy)
    return find("_{}_summary")(w, u, k, v), adjoint


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_summaries_equal_the_oracle(name: str, dtype: torch.dtype, find: Callable[[str], Any]) -> None:
    if name == "k_of_10000" and dtype == torch.float16:
        name = "k_of_1000"  # 4 standard deviations of 1e4 are beyond float16's largest number
    tensors = make(CASES[name], dtype)
    assert_summaries_close(*summaries_of(find, tensors), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("threads", [1, 4])
def test_summaries_are_what_forward_and_backward_give_beside_their_results(
    dtype: torch.dtype, threads: int, find: Callable[[str], Any]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # One column: four threads cut the time of the longer one.
        for problem in (Problem(T=37, gated=True), Problem(B=1, T=5000, C=5, gated=True, with_state=True)):
            tensors = make(problem, dtype)
            w, u, k, v, state = tensors.inputs
            own, adjoint = summaries_of(find, tensors)
            _, empty_after, _ = find("{}_forward")(w, u, k, v, None, False)
            torch.testing.assert_close(own, empty_after, rtol=1e-5, atol=1e-5)
            given = (w, u, k, v, state, tensors.r, None)
            *_, checkpoints = find("{}_mixing_forward")(*given, True)
            gstate = find("_{}_mixing_backward")(*given, checkpoints, tensors.gy, None)[4]
            torch.testing.assert_close(adjoint, gstate[:, :2], rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_summaries_of_no_steps_are_those_of_nothing(find: Callable[[str], Any]) -> None:
    w, u, k, v, _ = make(Problem(T=0)).inputs
    assert torch.equal(find("_{}_summary")(w, u, k, v), rwkv_kernels.empty_state(2, 19, device=w.device))
    checkpoints = torch.empty(2, 0, 3, 19)
    adjoint = find("_{}_adjoint_summary")(w, u, k, v, None, None, checkpoints, k)
    assert adjoint.shape == (2, 2, 19) and not adjoint.any()


def test_summaries_check_their_arguments_too(find: Callable[[str], Any]) -> None:
    w, u, k, v, state = make(Problem(with_state=True)).inputs
    wrong = (RuntimeError, ValueError, TypeError)
    checkpoints = torch.zeros(2, 1, 3, 19)
    with pytest.raises(wrong, match="v: expected shape"):
        find("_{}_summary")(w, u, k, v[:, :5])
    for given, message in (
        ((w, u, k, v, state[:1], None, checkpoints, k), "state: expected shape"),
        ((w, u, k, v, state, k[:, :5], checkpoints, k), "r: expected shape"),
        ((w, u, k, v, state, None, checkpoints[:, :0], k), "checkpoints: expected shape"),
        ((w, u, k, v, state, None, checkpoints, k.double()), "gy: expected .*float32"),
    ):
        with pytest.raises(wrong, match=message):
            find("_{}_adjoint_summary")(*given)
