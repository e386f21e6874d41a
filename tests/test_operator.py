"""Every backend against the float64 oracle: outputs, states and all gradients."""

from dataclasses import replace

import pytest
import torch
from problems import (
    PROBLEMS,
    Problem,
    assert_close,
    assert_solves,
    assert_tensor_close,
    largest_logit,
    least_scale,
    make,
    oracle,
    solve,
    tolerance,
)

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.inputs import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients_equal_the_oracle(name: str, dtype: torch.dtype, backend: str) -> None:
    if name == "k_of_10000" and dtype == torch.float16:
        name = "k_of_1000"  # 3 standard deviations of 1e4 are near float16's largest number, 4 beyond it
    assert_solves(make(PROBLEMS[name], dtype), backend)


GATED = (
    "small_with_state",
    "one_channel",
    "wide",
    "u_of_plus_50",
    "k_of_20",
    "transposed",
    "time_major",
    "every_second_channel",
    "expanded",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", GATED)
def test_gated_steps_equal_the_oracle(name: str, dtype: torch.dtype, backend: str) -> None:
    """With an r that is as large as k and lies in memory as k does."""
    problem = replace(PROBLEMS[name], T=3)
    tensors = make(problem, dtype)
    w, u, k, v, state = tensors.inputs
    r = make(problem, dtype, seed=1).k
    running = rwkv_kernels.empty_state(problem.B, problem.C, dtype=w.dtype) if state is None else state.clone()
    found = [
        rwkv_kernels.wkv_step(w, u, kt, vt, running, r=rt, backend=backend)
        for kt, vt, rt in zip(*(x.unbind(1) for x in (k, v, r)), strict=True)
    ]
    y, _ = reference.wkv(*tensors.exact().inputs)
    # The gate is the weight of the logit r beside one of 0, so r adds to what the logits cost.
    allowed = tolerance(dtype, problem.T, largest_logit(tensors) + float(r.abs().max()))
    assert_tensor_close("gated", torch.stack(found, 1), r.double().sigmoid() * y, allowed)


@pytest.mark.parametrize("T", [1, 37, 1024])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
def test_error_is_at_most_twice_that_of_the_step_loop(dtype: torch.dtype, T: int, compiled_backend: str) -> None:
    tensors = make(Problem(B=2, T=T, C=48), dtype)
    expected = oracle(tensors)
    found, loop = solve(tensors, compiled_backend), solve(tensors, "reference")
    for name, exact in expected.items():
        scale = max(float(exact.abs().max()), least_scale(name, tensors))
        error, loop_error = ((x[name].double() - exact).abs().max() / scale for x in (found, loop))
        # Where the loop is exact by luck, as in one step, an ulp is the measure.
        least = torch.finfo(found[name].dtype).eps
        assert error <= 2 * max(loop_error, least), f"{name}: {error:.2e}, step loop {loop_error:.2e}"


def test_two_runs_are_bitwise_equal(compiled_backend: str) -> None:
    tensors = make(Problem(B=3, T=200, C=70, with_state=True), torch.bfloat16)
    first, second = solve(tensors, compiled_backend), solve(tensors, compiled_backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_parameters_of_another_dtype_get_gradients_of_that_dtype(backend: str) -> None:
    tensors = make(Problem(), torch.float32)
    w, u = (x.to(torch.bfloat16).requires_grad_() for x in (tensors.w, tensors.u))
    rwkv_kernels.wkv(w, u, tensors.k, tensors.v, backend=backend).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (w, u)]
    rwkv_kernels.wkv(*wide, tensors.k.double(), tensors.v.double(), backend="reference").sum().backward()
    for narrow, exact in zip((w, u), wide, strict=True):
        assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16
        torch.testing.assert_close(
            narrow.grad.double(), exact.grad, rtol=2**-8, atol=2**-8 * float(exact.grad.abs().max())
        )


def test_long_sequence_equals_the_oracle(compiled_backend: str) -> None:
    tensors = make(Problem(B=1, T=5000, C=2, log_decay=-1e-3, with_state=True))
    assert_close(solve(tensors, compiled_backend), oracle(tensors), tensors)
