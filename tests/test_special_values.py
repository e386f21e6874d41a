"""NaN and infinities stay where they belong, and extremes stay finite."""

import pytest
import torch
from problems import Problem, Tensors, make, solve

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.inputs import DTYPES

T, C = 100, 40
PLACE = (1, 37, 5)  # b, t, c


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_nan_stays_in_its_sequence_and_channel_from_its_step_on(value: float, dtype: torch.dtype, backend: str) -> None:
    tensors = make(Problem(T=T, C=C), dtype)
    w, u, k, v, _ = tensors.inputs
    clean, _ = rwkv_kernels.wkv(w, u, k, v, return_state=True, backend=backend)
    k = k.clone()
    k[PLACE] = value
    y, state = rwkv_kernels.wkv(w, u, k, v, return_state=True, backend=backend)
    b, t, c = PLACE
    hit = torch.zeros(2, T, C, dtype=torch.bool)
    hit[b, t:, c] = True
    assert torch.equal(y.isnan(), hit)
    torch.testing.assert_close(y[~hit], clean[~hit], rtol=1e-2, atol=1e-2)
    assert torch.equal(state[:, :2].isnan().any(1), hit[:, -1])


@pytest.mark.parametrize("argument", ["k", "v", "gy", "w", "u", "state"])
def test_nan_is_in_the_same_places_as_in_the_oracle(argument: str, compiled_backend: str) -> None:
    tensors = make(Problem(T=T, C=C, with_state=True))
    value = getattr(tensors, argument)
    value[PLACE if value.dim() == 3 and argument != "state" else (1, 0, 5) if argument == "state" else 5] = torch.nan
    found, expected = solve(tensors, compiled_backend), solve(tensors, "reference")
    for name, tensor in expected.items():
        assert torch.equal(found[name].isnan(), tensor.isnan()), name


@pytest.mark.parametrize("argument", ["w", "u", "state", "gstate"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_a_nan_of_any_bits_stays_nan_in_16_bit_outputs(argument: str, bits: int, compiled_backend: str) -> None:
    tensors = make(Problem(T=20, C=16, with_state=True), torch.bfloat16)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    getattr(tensors, argument)[..., 5] = nan
    found, expected = solve(tensors, compiled_backend), solve(tensors, "reference")
    assert any(x.isnan().any() for x in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(found[name].isnan(), tensor.isnan()), name


def _step(tensors: Tensors, backend: str, r: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of one step and the state after it."""
    assert tensors.state is not None
    state = tensors.state.clone()
    y = rwkv_kernels.wkv_step(tensors.w, tensors.u, tensors.k[:, 0], tensors.v[:, 0], state, r=r, backend=backend)
    return y, state


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_gate_is_exactly_open_or_shut_at_its_ends(dtype: torch.dtype, backend: str) -> None:
    tensors = make(Problem(T=1, C=C, with_state=True), dtype)
    y, after = _step(tensors, backend, None)
    for r, gate in [(torch.inf, 1), (1e4, 1), (-1e4, 0), (-torch.inf, 0)]:
        gated, state = _step(tensors, backend, torch.full_like(y, r))
        assert torch.equal(gated, gate * y), r
        assert torch.equal(state, after), r


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_nan_in_r_stays_where_it_is(dtype: torch.dtype, backend: str) -> None:
    tensors = make(Problem(T=1, C=C, with_state=True), dtype)
    r = make(Problem(T=1, C=C), dtype, seed=1).k[:, 0]
    clean, after = _step(tensors, backend, r)
    hit = torch.zeros(2, C, dtype=torch.bool)
    hit[1, 5] = True
    gated, state = _step(tensors, backend, r.masked_fill(hit, torch.nan))
    assert torch.equal(gated.isnan(), hit)
    assert torch.equal(gated[~hit], clean[~hit])
    assert torch.equal(state, after)


def test_a_key_of_minus_infinity_has_no_weight(backend: str) -> None:
    tensors = make(Problem(T=T, C=C))
    w, u, k, v, _ = tensors.inputs
    k = k.clone()
    k[PLACE] = -torch.inf
    y, _ = rwkv_kernels.wkv(w, u, k, v, return_state=True, backend=backend)
    exact, _ = reference.wkv(w.double(), u.double(), k.double(), v.double())
    assert y.isfinite().all()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_step_without_any_weight_is_zero_over_zero(backend: str) -> None:
    w, u, k, v, _ = make(Problem(T=20)).inputs
    k = k.clone()
    k[:, :3] = -torch.inf
    y = rwkv_kernels.wkv(w, u, k, v, backend=backend)
    assert y[:, :3].isnan().all() and y[:, 3:].isfinite().all()


@pytest.mark.parametrize("w", [64.0, 89.0, 6e4, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_ends_of_the_decay_have_the_gradients_of_float64(w: float, dtype: torch.dtype, backend: str) -> None:
    """-exp(w) overflows in float32 from 89 on, and no weight is left for a gradient to come from."""
    tensors = make(Problem(T=30, C=16, with_state=True), dtype)
    for parameter in {torch.float32, dtype} - {torch.float64}:
        tensors.w = tensors.w.to(parameter)
        tensors.w[::2] = w
        exact = tensors.exact()
        exact.w.clamp_(-600, 600)
        found, expected = solve(tensors, backend), solve(exact, "reference")
        assert (found["gw"][::2] == 0).all()
        assert (found["gw"][1::2] != 0).all()
        assert all(x.isfinite().all() for x in found.values())
        torch.testing.assert_close(found["y"].double(), expected["y"], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found["gk"].double(), expected["gk"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("steps", [1, 80])
def test_the_strongest_decay_over_masked_steps_spoils_nothing_after_them(steps: int, backend: str) -> None:
    tensors = make(Problem(T=steps + 1, C=C))
    w, u, k, v, _ = tensors.inputs
    w, k = torch.full_like(w, 90.0), k.clone()
    k[:, :steps] = -torch.inf
    y = rwkv_kernels.wkv(w, u, k, v, backend=backend)
    assert torch.equal(y[:, -1], v[:, -1])
    state = rwkv_kernels.empty_state(2, C)
    for t in range(steps + 1):
        y_step = rwkv_kernels.wkv_step(w, u, k[:, t], v[:, t], state, backend=backend)
    assert torch.equal(y_step, v[:, -1])


@pytest.mark.parametrize("k_scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("log_decay", [-1e-30, -1.0, -1e4])
@pytest.mark.parametrize("u", [-1e4, 0.0, 1e4])
def test_extremes_stay_finite(k_scale: float, log_decay: float, u: float, backend: str) -> None:
    tensors = make(Problem(T=70, C=16, k_scale=k_scale, log_decay=log_decay, u=u, with_state=True))
    tensors.k.clamp_(-1e4, 1e4)
    for name, value in solve(tensors, backend).items():
        assert value.isfinite().all(), name


def test_large_values_do_not_overflow(compiled_backend: str) -> None:
    tensors = make(Problem(T=50))
    tensors.v *= 1e37 / tensors.v.abs().max()
    y = rwkv_kernels.wkv(tensors.w, tensors.u, tensors.k, tensors.v, backend=compiled_backend)
    assert y.isfinite().all() and y.abs().max() <= 1.001e37


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_passes_through(dtype: torch.dtype, compiled_backend: str) -> None:
    """One step from an empty state returns v: all finite bit patterns, both zeros and infinities, and NaN."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype).reshape(16, 1, -1)
    C = v.shape[-1]
    y = rwkv_kernels.wkv(torch.zeros(C), torch.zeros(C), torch.zeros_like(v), v, backend=compiled_backend)
    assert torch.equal(y.isnan(), v.isnan())
    finite = ~v.isnan()
    assert torch.equal(y[finite], v[finite])


@pytest.mark.parametrize("u", [20.0, 31.0, 40.0, 45.0, 50.0, 59.0])
@pytest.mark.parametrize("far", [-40.0, -90.0, -200.0])
def test_a_far_key_stays_far_under_a_large_bonus(u: float, far: float, backend: str) -> None:
    """The bonus must not lift a weight that was held at the smallest float."""
    k = torch.tensor([0.0, far, far, 0.0]).view(1, 4, 1)
    v = torch.tensor([0.0, 1.0, 1.0, 2.0]).view(1, 4, 1)
    w, bonus = torch.tensor([-9.0]), torch.tensor([u])
    exact = reference.wkv_direct(w.double(), bonus.double(), k.double(), v.double())
    y = rwkv_kernels.wkv(w, bonus, k, v, backend=backend)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", [1, 15, 16, 20, 64, 100])
def test_left_padding_by_minus_infinity_changes_nothing_after_it(padding: int, backend: str) -> None:
    tensors = make(Problem(T=30))
    w, u, k, v, _ = tensors.inputs
    expected, end = rwkv_kernels.wkv(w, u, k, v, return_state=True, backend=backend)
    padded_k = torch.cat((torch.full((2, padding, 19), -torch.inf), k), 1)
    padded_v = torch.cat((torch.ones(2, padding, 19), v), 1)
    y, state = rwkv_kernels.wkv(w, u, padded_k, padded_v, return_state=True, backend=backend)
    assert y[:, :padding].isnan().all()
    torch.testing.assert_close(y[:, padding:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[:, 0] / state[:, 1], end[:, 0] / end[:, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("repeats", [1, 4])
def test_nan_does_not_reach_back_in_time(value: float, repeats: int, backend: str) -> None:
    """Not even through the bounds of the logits that a tile of steps shares."""
    k = torch.tensor([100.0, 100.0, value, 0.0, 0.0]).view(1, 5, 1).repeat(1, repeats, 1)
    v = torch.arange(5.0 * repeats).view(1, -1, 1)
    w = u = torch.zeros(1)
    exact = reference.wkv_direct(w.double(), u.double(), k.double(), v.double())
    y = rwkv_kernels.wkv(w, u, k, v, backend=backend)
    torch.testing.assert_close(y[:, :2].double(), exact[:, :2], rtol=1e-5, atol=1e-5)
    assert y[:, 2:].isnan().all()
