"""The state: continuation, valid values, and the gradient that passes through it."""

import pytest
import torch
from problems import Problem, assert_tensor_close, log_denominator, make, solve, tolerance

import rwkv_kernels


def _assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: int, what: str = "") -> None:
    allowed = ulps * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed, msg=lambda message: what + message)


@pytest.mark.parametrize("cut", [0, 1, 16, 63, 64, 65, 130])
def test_split_and_resume_equals_whole(cut: int, backend: str) -> None:
    tensors = make(Problem(T=130, with_state=True)).widest(backend)
    w, u, k, v, state = tensors.inputs
    whole, end = rwkv_kernels.wkv(w, u, k, v, state, return_state=True, backend=backend)
    first, middle = rwkv_kernels.wkv(w, u, k[:, :cut], v[:, :cut], state, return_state=True, backend=backend)
    second, resumed = rwkv_kernels.wkv(w, u, k[:, cut:], v[:, cut:], middle, return_state=True, backend=backend)
    _assert_close(torch.cat((first, second), 1), whole, 450)
    _assert_close(resumed[:, 0] / resumed[:, 1], end[:, 0] / end[:, 1], 450)
    _assert_close(log_denominator(resumed), log_denominator(end), 450)


@pytest.mark.parametrize("cut", [1, 64, 70])
def test_gradients_through_a_cut_equal_those_of_the_whole(cut: int, backend: str) -> None:
    tensors = make(Problem(T=130, with_state=True)).widest(backend)
    assert tensors.state is not None

    def gradients(split: bool) -> tuple[torch.Tensor, ...]:
        w, u, k, v, state = leaves = [x.detach().requires_grad_() for x in tensors.inputs if x is not None]
        if split:
            y1, middle = rwkv_kernels.wkv(w, u, k[:, :cut], v[:, :cut], state, return_state=True, backend=backend)
            y = torch.cat((y1, rwkv_kernels.wkv(w, u, k[:, cut:], v[:, cut:], middle, backend=backend)), 1)
        else:
            y = rwkv_kernels.wkv(w, u, k, v, state, backend=backend)
        return torch.autograd.grad((y * tensors.gy).sum(), leaves)

    for name, parted, whole in zip(["w", "u", "k", "v", "state"], gradients(True), gradients(False), strict=True):
        _assert_close(parted, whole, 4500, f"g{name}: ")


def test_steps_equal_the_sequence(backend: str) -> None:
    tensors = make(Problem(T=40, with_state=True))
    w, u, k, v, state = tensors.inputs
    whole, end = rwkv_kernels.wkv(w, u, k, v, state, return_state=True, backend=backend)
    assert state is not None
    running = state.clone()
    steps = [rwkv_kernels.wkv_step(w, u, k[:, t], v[:, t], running, backend=backend) for t in range(40)]
    allowed = tolerance(torch.float32, 40, 5.0)
    assert_tensor_close("y", torch.stack(steps, 1), whole, allowed)
    assert_tensor_close("mean", running[:, 0] / running[:, 1], end[:, 0] / end[:, 1], allowed)


@pytest.mark.parametrize("change", [-30.0, 5.0, 40.0])
def test_the_gauge_does_not_matter(change: float, backend: str) -> None:
    tensors = make(Problem(T=70, with_state=True))
    assert tensors.state is not None
    shifted = tensors.state.clone()
    shifted[:, :2] *= torch.exp(torch.tensor(change))
    shifted[:, 2] -= change
    w, u, k, v, _ = tensors.inputs
    y = rwkv_kernels.wkv(w, u, k, v, tensors.state, backend=backend)
    y_shifted = rwkv_kernels.wkv(w, u, k, v, shifted, backend=backend)
    assert_tensor_close("y", y_shifted, y, tolerance(torch.float32, 70, abs(change)))


@pytest.mark.parametrize("top", [0.0, -1e30, -65500.0, -torch.inf])
def test_a_state_without_weight_is_empty_whatever_its_max(top: float, backend: str) -> None:
    tensors = make(Problem(T=20))
    w, u, k, v, _ = tensors.inputs
    state = torch.zeros(2, 3, 19)
    state[:, 2] = top
    expected = rwkv_kernels.wkv(w, u, k, v, backend=backend)
    assert torch.equal(rwkv_kernels.wkv(w, u, k, v, state, backend=backend), expected)


def test_none_is_the_empty_state(backend: str) -> None:
    w, u, k, v, _ = make(Problem()).inputs
    empty = rwkv_kernels.empty_state(2, 19)
    for a, b in zip(
        rwkv_kernels.wkv(w, u, k, v, return_state=True, backend=backend),
        rwkv_kernels.wkv(w, u, k, v, empty, return_state=True, backend=backend),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gradient_of_state_alone(backend: str) -> None:
    """Nothing but the returned state is used: y has no gradient at all."""
    tensors = make(Problem(T=70, with_state=True)).widest(backend)

    def gradients(name: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors.inputs if x is not None]
        _, state = rwkv_kernels.wkv(*leaves, return_state=True, backend=name)
        loss = ((state[:, 0] / state[:, 1]) * tensors.gy[:, 0]).sum() + log_denominator(state).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    for found, expected in zip(gradients(backend), gradients("reference"), strict=True):
        if expected is None:  # in the oracle's graph, the state does not depend on u
            assert found is None or not found.any()
        else:
            _assert_close(found, expected, 4500)


def test_state_is_not_modified(backend: str) -> None:
    tensors = make(Problem(with_state=True))
    assert tensors.state is not None
    before = tensors.state.clone()
    solve(tensors, backend)
    assert torch.equal(tensors.state, before)


def test_no_steps_leave_the_state_as_it_is(backend: str) -> None:
    tensors = make(Problem(T=5, with_state=True))
    w, u, k, v, state = tensors.inputs
    assert state is not None
    state = state.requires_grad_()
    y, after = rwkv_kernels.wkv(w, u, k[:, :0], v[:, :0], state, return_state=True, backend=backend)
    assert y.shape == (2, 0, 19) and torch.equal(after, state)
    (gradient,) = torch.autograd.grad((after * tensors.gstate).sum(), state)
    assert torch.equal(gradient, tensors.gstate)
