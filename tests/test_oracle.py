"""The oracle itself: two independent formulas agree, and so do their derivatives with finite differences."""

import pytest
import torch
from problems import PROBLEMS, Problem, make

from rwkv_kernels import reference


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if not problem.with_state])
def test_step_loop_equals_direct_softmax(name: str) -> None:
    tensors = make(PROBLEMS[name]).exact()
    arguments = (tensors.w, tensors.u, tensors.k, tensors.v)
    # A logit of 1e4 is known to 1e4 · 2^-53; T of them are added up.
    tolerance = 1e-13 * max(1.0, PROBLEMS[name].k_scale) * PROBLEMS[name].T
    torch.testing.assert_close(
        reference.wkv(*arguments)[0], reference.wkv_direct(*arguments), rtol=tolerance, atol=tolerance
    )


def test_both_forms_pass_gradcheck() -> None:
    tensors = make(Problem(B=2, T=6, C=3, with_state=True)).exact()
    inputs = [x.requires_grad_() for x in (tensors.w, tensors.u, tensors.k, tensors.v)]
    assert tensors.state is not None
    assert torch.autograd.gradcheck(reference.wkv_direct, inputs)
    assert torch.autograd.gradcheck(lambda *x: reference.wkv(*x)[0], (*inputs, tensors.state.requires_grad_()))


def test_first_output_is_the_first_value() -> None:
    tensors = make(Problem()).exact()
    y, _ = reference.wkv(tensors.w, tensors.u, tensors.k, tensors.v)
    torch.testing.assert_close(y[:, 0], tensors.v[:, 0], rtol=1e-15, atol=0)


def test_constant_values_are_kept() -> None:
    tensors = make(Problem()).exact()
    y, _ = reference.wkv(tensors.w, tensors.u, tensors.k, torch.full_like(tensors.v, 3.0))
    torch.testing.assert_close(y, torch.full_like(y, 3.0), rtol=1e-14, atol=0)


def test_without_decay_and_bonus_it_is_a_running_softmax() -> None:
    tensors = make(Problem(T=20)).exact()
    w, u = torch.full_like(tensors.w, -torch.inf), torch.zeros_like(tensors.u)
    weights = tensors.k.exp()
    expected = (weights * tensors.v).cumsum(1) / weights.cumsum(1)
    torch.testing.assert_close(reference.wkv(w, u, tensors.k, tensors.v)[0], expected, rtol=1e-13, atol=1e-13)


def test_key_gradients_sum_to_zero() -> None:
    """A constant added to every key changes nothing, from an empty state on."""
    tensors = make(Problem(T=50)).exact()
    k = tensors.k.requires_grad_()
    y, _ = reference.wkv(tensors.w, tensors.u, k, tensors.v)
    (gk,) = torch.autograd.grad((y * tensors.gy).sum(), k)
    torch.testing.assert_close(gk.sum(1), torch.zeros(2, 19, dtype=torch.float64), rtol=0, atol=1e-12)
