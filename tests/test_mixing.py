"""The receptance gate and packed sequences, on every backend against the oracle."""

from dataclasses import replace

import pytest
import torch
from problems import (
    MIXING_PROBLEMS,
    Problem,
    assert_solves,
    assert_tensor_close,
    largest_logit,
    make,
    solve,
    tolerance,
    widest_dtype,
)

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.inputs import DTYPES

BOTH = Problem(C=20, lengths=(5, 0, 70, 1), gated=True, with_state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", MIXING_PROBLEMS)
def test_outputs_and_gradients_equal_the_oracle(name: str, dtype: torch.dtype, backend: str) -> None:
    assert_solves(make(MIXING_PROBLEMS[name], dtype), backend)


@pytest.mark.parametrize("name", ["packed_of_all_lengths", "gated_and_packed_of_all_lengths", "packed"])
def test_the_oracle_takes_packed_sequences_one_by_one(name: str) -> None:
    tensors = make(MIXING_PROBLEMS[name], torch.float64)
    w, u, k, v, state = tensors.inputs
    r, cu_seqlens = tensors.r, tensors.cu_seqlens
    assert cu_seqlens is not None
    y, after = reference.wkv(w, u, k, v, state, r, cu_seqlens)
    gate = 1 if r is None else r.sigmoid()
    for n, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        given = None if state is None else state[n : n + 1]
        own, own_after = reference.wkv(w, u, k[:, begin:end], v[:, begin:end], given)
        torch.testing.assert_close((gate * torch.ones_like(y))[:, begin:end] * own, y[:, begin:end], rtol=0, atol=0)
        torch.testing.assert_close(own_after[0], after[n], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gated", "packed", "gated_and_packed"])
def test_derivative_equals_finite_differences(name: str, compiled_backend: str) -> None:
    if widest_dtype(compiled_backend) != torch.float64:
        pytest.skip("differences need float64")
    problem = replace(MIXING_PROBLEMS[name], B=1, T=5, C=2, with_state=True)
    tensors = make(replace(problem, lengths=None if problem.lengths is None else (2, 0, 3)), torch.float64)
    given = [x.requires_grad_() for x in (*tensors.inputs, tensors.r) if x is not None]

    def free_of_the_gauge(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = tensors.options | ({} if tensors.r is None else {"r": leaves[5]})
        y, after = rwkv_kernels.wkv(*leaves[:5], **options, return_state=True, backend=compiled_backend)
        return y, after[:, 0] / after[:, 1], after[:, 2] + after[:, 1].log()

    assert torch.autograd.gradcheck(free_of_the_gauge, given)


def test_boundaries_may_have_32_or_64_bits(backend: str) -> None:
    tensors = make(BOTH)
    assert tensors.cu_seqlens is not None and tensors.cu_seqlens.dtype == torch.int32
    narrow, wide = solve(tensors, backend), solve(replace(tensors, cu_seqlens=tensors.cu_seqlens.long()), backend)
    for name, x in narrow.items():
        torch.testing.assert_close(x, wide[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["gated_wide_and_long", "packed_of_all_lengths", "gated_and_packed_of_all_lengths"])
def test_two_runs_are_bitwise_equal(name: str, compiled_backend: str) -> None:
    tensors = make(MIXING_PROBLEMS[name], torch.bfloat16)
    first, second = solve(tensors, compiled_backend), solve(tensors, compiled_backend)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True)


def test_packed_sequences_do_not_depend_on_one_another(compiled_backend: str) -> None:
    tensors = make(replace(BOTH, lengths=(30, 70, 3)))
    k, v = tensors.k.clone(), tensors.v.clone()
    k[:, 30:100], v[:, 30:100] = 1e4, float("nan")
    expected, found = solve(tensors, compiled_backend), solve(replace(tensors, k=k, v=v), compiled_backend)
    for name in ("y", "gk", "gv", "gr"):
        for part in (slice(0, 30), slice(100, None)):
            assert torch.equal(expected[name][:, part], found[name][:, part]), name
    for name in ("state_mean", "state_log_den", "gstate"):
        assert torch.equal(expected[name][::2], found[name][::2]), name


def test_sequences_without_steps_hand_their_states_on(backend: str) -> None:
    tensors = make(Problem(C=5, lengths=(0, 3, 0, 0), with_state=True))
    w, u, k, v, state = tensors.inputs
    assert state is not None
    state[2, 1] = 0  # an empty state, whatever else it holds
    state.requires_grad_()
    _, after = rwkv_kernels.wkv(w, u, k, v, state, **tensors.options, return_state=True, backend=backend)
    assert torch.equal(after[0], state[0]) and torch.equal(after[3], state[3])
    assert torch.equal(after[2, 1:], rwkv_kernels.empty_state(1, 5)[0, 1:])
    (gstate,) = torch.autograd.grad((after[:, :2] * tensors.gstate[:, :2]).sum(), [state])
    assert torch.equal(gstate[0, :2], tensors.gstate[0, :2]) and torch.equal(gstate[3, :2], tensors.gstate[3, :2])


@pytest.mark.parametrize(("N", "C"), [(3, 4), (0, 4), (2, 0)])
def test_no_steps_at_all(N: int, C: int, backend: str) -> None:
    tensors = make(Problem(C=C, lengths=(0,) * N, gated=True, with_state=True))
    w, u, k, v, state = (x.requires_grad_() for x in tensors.inputs if x is not None)
    y, after = rwkv_kernels.wkv(w, u, k, v, state, **tensors.options, return_state=True, backend=backend)
    assert y.shape == (1, 0, C) and torch.equal(after, state)
    loss = y.sum() + (after * tensors.gstate).sum()
    gw, gu, gk, gstate = torch.autograd.grad(loss, [w, u, k, state], allow_unused=True, materialize_grads=True)
    assert not gw.any() and not gu.any() and gk.shape == k.shape
    assert torch.equal(gstate[:, :2], tensors.gstate[:, :2])


@pytest.mark.parametrize("T", [1, 3, 200])
def test_gates_at_their_ends(T: int, backend: str) -> None:
    """At +inf the gate is open and at -inf closed, and neither end has a gradient; NaN is what torch makes of it."""
    tensors = make(Problem(B=1, T=T, C=70))
    w, u, k, v, _ = tensors.inputs
    r = torch.zeros_like(k)
    r[..., 0::4], r[..., 1::4], r[:, -1, 2::4] = float("inf"), float("-inf"), float("nan")
    leaves = [x.requires_grad_() for x in (k, v, r)]
    y = rwkv_kernels.wkv(w, u, k, v, r=r, backend=backend)
    found = [y, *torch.autograd.grad(y, leaves, tensors.gy)]
    exact = torch.sigmoid(r.double()) * rwkv_kernels.wkv(*(x.double() for x in (w, u, k, v)), backend="reference")
    expected = [exact, *torch.autograd.grad(exact, leaves, tensors.gy.double())]
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right.to(x.dtype), rtol=1e-5, atol=1e-5, equal_nan=True)
    gated, _, _, gr = found
    assert not gated[..., 1::4].any() and not gr[..., 0::4].any() and not gr[..., 1::4].any()


@pytest.mark.parametrize("size", [30.0, 80.0])
def test_an_almost_closed_or_open_gate_keeps_its_digits(size: float, compiled_backend: str) -> None:
    """Small factors meet small denominators: neither may underflow or overflow where the result does not.

    Divided by their factors, y and gr are what the gate is of, with the relative error of the factor on top.
    """
    tensors = make(Problem(B=1, T=40, C=40, k_scale=8.0, gated=True))
    assert tensors.r is not None
    w, u, k, v, _ = tensors.inputs
    r = (tensors.r.sign() * size).requires_grad_()
    y = rwkv_kernels.wkv(w, u, k, v, r=r, backend=compiled_backend)
    (gr,) = torch.autograd.grad(y, [r], tensors.gy)
    gate = torch.sigmoid(r.detach().double())
    # Of an open gate torch's own gradient has 1 - sigmoid(r), with few digits even in float64.
    slope = tensors.gy.double() * gate * torch.sigmoid(-r.detach().double())
    exact = rwkv_kernels.wkv(*(x.double() for x in (w, u, k, v)), backend="reference")
    # The logit in powers of 2 and the factor to there are each off by half an ulp, and the weight by as much.
    allowed = tolerance(torch.float32, 40, largest_logit(tensors)) + torch.finfo(torch.float32).eps * size
    for name, found, factor in (("y", y, gate), ("gr", gr, slope)):
        normal = (factor * exact).abs() > 1e-37
        zero = torch.zeros_like(exact)
        assert_tensor_close(name, torch.where(normal, found / factor, zero), torch.where(normal, exact, zero), allowed)


BAD = {
    "a_list": ([0, 3, 6], TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
    "floats": (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens: expected int32 or int64, got torch.float32"),
    "a_matrix": (torch.tensor([[0, 6]]), ValueError, r"cu_seqlens: expected shape \[N \+ 1\], got \[1, 2\]"),
    "nothing": (torch.tensor([], dtype=torch.int64), ValueError, r"cu_seqlens: expected shape \[N \+ 1\], got \[0\]"),
    "not_from_0": (torch.tensor([1, 6]), ValueError, "cu_seqlens: expected to start at 0, got 1"),
    "beyond_the_end": (torch.tensor([0, 7]), ValueError, "cu_seqlens: expected to end at 6, .* got 7"),
    "before_the_end": (torch.tensor([0, 5]), ValueError, "cu_seqlens: expected to end at 6, .* got 5"),
    "falling": (torch.tensor([0, 4, 2, 6]), ValueError, "cu_seqlens: expected to rise, got 2 after 4 at 2"),
    "elsewhere": (torch.tensor([0, 6], device="meta"), ValueError, "cu_seqlens: expected device .* as k, got meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_boundaries_are_refused(name: str, backend: str) -> None:
    tensors = make(Problem(B=1, T=6))
    boundaries, error, message = BAD[name]
    if isinstance(boundaries, torch.Tensor) and boundaries.device.type != "meta":
        boundaries = boundaries.to(tensors.k.device)
    if name in ("not_from_0", "beyond_the_end", "before_the_end", "falling") and tensors.k.device.type != "cpu":
        pytest.skip("no element is read on the host")
    with pytest.raises(error, match=message):
        rwkv_kernels.wkv(*tensors.inputs, cu_seqlens=boundaries, backend=backend)


def test_what_does_not_fit_the_boundaries_is_refused(backend: str) -> None:
    tensors = make(Problem(B=2, T=6))
    boundaries = torch.tensor([0, 2, 6], device=tensors.k.device)
    with pytest.raises(ValueError, match=r"k: expected shape \[1, total, C\] with cu_seqlens, got \[2, 6, 19\]"):
        rwkv_kernels.wkv(*tensors.inputs, cu_seqlens=boundaries, backend=backend)
    w, u, k, v, _ = make(Problem(B=1, T=6)).inputs
    state = rwkv_kernels.empty_state(1, 19, device=k.device)
    with pytest.raises(ValueError, match=r"state: expected shape \[N, 3, C\] = \[2, 3, 19\], got \[1, 3, 19\]"):
        rwkv_kernels.wkv(w, u, k, v, state, cu_seqlens=boundaries, backend=backend)


def test_an_r_that_does_not_fit_is_refused(backend: str) -> None:
    tensors = make(Problem())
    for r, error, message in (
        (tensors.k[:, 1:], ValueError, r"r: expected shape \[B, T, C\] = \[2, 37, 19\] as k, got \[2, 36, 19\]"),
        (tensors.k.double(), TypeError, "r: expected torch.float32 as k, got torch.float64"),
        (tensors.k.to("meta"), ValueError, "r: expected device .* as k, got meta"),
        (1.0, TypeError, "r: expected a torch.Tensor, got float"),
    ):
        with pytest.raises(error, match=message):
            rwkv_kernels.wkv(*tensors.inputs, r=r, backend=backend)
