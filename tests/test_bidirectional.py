"""The bidirectional operator on every backend that has it, against the sum over all pairs of steps in float64."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bi_problems import (
    EITHER_SIGN,
    LONG_PROBLEMS,
    PROBLEMS,
    assert_solves,
    direct,
    largest_logit,
    make,
    solve,
    solve_by,
)
from problems import Problem, assert_tensor_close, tolerance, widest_dtype
from torch import Tensor
from torch._subclasses import FakeTensorMode

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.inputs import DTYPES

PLACE = (1, 37, 5)  # b, t, c
ids = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients_equal_the_sum(name: str, dtype: torch.dtype, bi_backend: str) -> None:
    assert_solves(make(PROBLEMS[name], dtype), bi_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
@pytest.mark.parametrize("name", LONG_PROBLEMS)
def test_long_sequences_equal_the_recurrence(name: str, dtype: torch.dtype, compiled_bi_backend: str) -> None:
    assert_solves(make(LONG_PROBLEMS[name], dtype), compiled_bi_backend, reference.bi_wkv)


def test_sums_that_outgrow_their_scale_move_it_and_their_gradients(compiled_bi_backend: str) -> None:
    """Without decay the sums grow with the steps; the exact result needs no distances, and so no pairs."""
    tensors = make(Problem(B=1, T=200_000, C=16, k_scale=0.1, log_decay=0.0))
    found = solve_by(tensors, compiled_bi_backend)

    def exact(log_decay: Tensor, u: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        a, ahead = k.exp(), u.expm1()
        return ((a * v).sum(1) + ahead * a * v) / (a.sum(1) + ahead * a)

    on_cpu = tensors.changed(Tensor.cpu)
    allowed = tolerance(torch.float32, tensors.steps, largest_logit(on_cpu))
    expected = solve(on_cpu.exact(), exact)
    for name in ("y", "gk", "gv", "gu"):
        assert_tensor_close(name, found[name].cpu(), expected[name], allowed)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_two_oracles_agree(name: str) -> None:
    """To what float64 knows: weights that grow have the rounding of logits of |log_decay|·T."""
    tensors = make(PROBLEMS[name], torch.float64)
    found, expected = solve(tensors, reference.bi_wkv), solve(tensors, direct)
    for key, exact in expected.items():
        assert_tensor_close(key, found[key], exact, 1e-10, float(tensors.gy.abs().max() * tensors.v.abs().max()))


def test_the_oracle_has_the_values_of_the_formula() -> None:
    """Numbers from the formula by hand: keys 0, so that all that counts is the distance and the bonus."""
    log_decay, u = torch.tensor([0.5]).double().log(), torch.tensor([3.0]).double().log()
    k, v = torch.zeros(1, 3, 1).double(), torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1).double()
    # The neighbour has weight 1, the one after it 0.5, the step itself 3.
    expected = [(3 + 10 + 50) / 4.5, (1 + 30 + 100) / 5, (0.5 + 10 + 300) / 4.5]
    for oracle in (reference.bi_wkv, reference.bi_wkv_direct):
        assert oracle(log_decay, u, k, v).flatten().tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ["small", "gated", "packed"])
def test_derivative_equals_finite_differences(name: str, bi_backend: str) -> None:
    if widest_dtype(bi_backend) != torch.float64:
        pytest.skip("differences need float64")
    lengths = (2, 0, 3) if PROBLEMS[name].lengths else None
    tensors = make(replace(PROBLEMS[name], B=1, T=5, C=2, lengths=lengths), torch.float64)
    leaves = tensors.leaves()

    def function(*x: Tensor) -> Tensor:
        r = x[4] if len(x) > 4 else None
        return rwkv_kernels.bi_wkv(*x[:4], r=r, cu_seqlens=tensors.cu_seqlens, backend=bi_backend)

    assert torch.autograd.gradcheck(function, list(leaves.values()))


def test_a_reversed_sequence_has_reversed_results(bi_backend: str) -> None:
    tensors = make(replace(PROBLEMS["an_image_of_14_by_14"], gated=True)).widest(bi_backend)
    there, back = solve_by(tensors, bi_backend), solve_by(tensors.changed(_flipped), bi_backend)
    allowed = 1e-10 if tensors.k.dtype == torch.float64 else 1e-4
    for name, x in there.items():
        torch.testing.assert_close(_flipped(back[name]), x, rtol=allowed, atol=allowed)


def _flipped(x: Tensor) -> Tensor:
    return x.flip(1) if x.dim() == 3 else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
@pytest.mark.parametrize("name", ["gated_wide", "packed_of_all_lengths", "k_of_1000", "wide"])
def test_two_runs_are_bitwise_equal(name: str, dtype: torch.dtype, compiled_bi_backend: str) -> None:
    tensors = make(PROBLEMS[name], dtype)
    first, second = solve_by(tensors, compiled_bi_backend), solve_by(tensors, compiled_bi_backend)
    for key, x in first.items():
        assert torch.equal(x, second[key]), key


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors, threads = make(Problem(B=3, T=300, C=200)), torch.get_num_threads()
    try:
        found = []
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(solve_by(tensors, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for key, x in found[0].items():
        assert torch.equal(x, found[1][key]), key


def test_packed_sequences_equal_their_own_calls_bit_by_bit() -> None:
    """The CPU cuts no sequence, so that each is computed as if it was alone."""
    tensors = make(PROBLEMS["gated_and_packed"])
    assert tensors.cu_seqlens is not None and tensors.r is not None
    packed = solve_by(tensors, "cpu")
    for begin, end in zip(tensors.cu_seqlens[:-1].tolist(), tensors.cu_seqlens[1:].tolist(), strict=True):
        part = tensors.changed(functools.partial(_part, begin=begin, end=end))
        own = solve_by(replace(part, cu_seqlens=None), "cpu")
        for name in ("y", "gk", "gv", "gr"):
            assert torch.equal(packed[name][:, begin:end], own[name]), name


def _part(x: Tensor, *, begin: int, end: int) -> Tensor:
    return x[:, begin:end] if x.dim() == 3 else x


def test_packed_sequences_do_not_depend_on_one_another(compiled_bi_backend: str) -> None:
    tensors = make(Problem(C=20, lengths=(30, 70, 3), gated=True))
    k, v = tensors.k.clone(), tensors.v.clone()
    k[:, 30:100], v[:, 30:100] = 1e4, float("nan")
    expected = solve_by(tensors, compiled_bi_backend)
    found = solve_by(replace(tensors, k=k, v=v), compiled_bi_backend)
    for name in ("y", "gk", "gv", "gr"):
        for part in (slice(0, 30), slice(100, None)):
            assert torch.equal(expected[name][:, part], found[name][:, part]), name
    assert found["y"][:, 30:100].isnan().all()


def test_boundaries_may_have_32_or_64_bits(bi_backend: str) -> None:
    tensors = make(PROBLEMS["gated_and_packed"])
    assert tensors.cu_seqlens is not None
    narrow = solve_by(tensors, bi_backend)
    wide = solve_by(replace(tensors, cu_seqlens=tensors.cu_seqlens.long()), bi_backend)
    for name, x in narrow.items():
        assert torch.equal(x, wide[name]), name


@pytest.mark.parametrize(("B", "T", "C", "lengths"), [(2, 0, 3, None), (0, 5, 3, None), (2, 5, 0, None), (1, 0, 3, ())])
def test_nothing_at_all(B: int, T: int, C: int, lengths: tuple[int, ...] | None, bi_backend: str) -> None:
    tensors = make(Problem(B=B, T=T, C=C, gated=True, lengths=lengths))
    found = solve_by(tensors, bi_backend)
    assert found["y"].shape == found["gr"].shape == (B, T, C)
    assert not found["gu"].any() and not found["glog_decay"].any()


# ---- layouts ----


def _copies(function: Callable[[], Any]) -> set[str]:
    """Of torch's functions that make copies, those that are called."""
    with torch.profiler.profile() as profile:
        function()
    copying = {"aten::clone", "aten::copy_", "aten::contiguous"}
    return copying & {event.key for event in profile.key_averages()}


def test_rows_and_columns_of_an_image_are_not_copied(bi_backend: str) -> None:
    image = make(Problem(B=12, T=7, C=64)).k  # [H, W, C]
    log_decay, u = torch.full((64,), -0.1), torch.zeros(64)
    columns = image.transpose(0, 1)
    found = rwkv_kernels.bi_wkv(log_decay, u, columns, columns, backend=bi_backend)
    expected = rwkv_kernels.bi_wkv(log_decay, u, *[columns.contiguous()] * 2, backend=bi_backend)
    assert torch.equal(found, expected)
    if bi_backend == "cpu":
        assert _copies(lambda: rwkv_kernels.bi_wkv(log_decay, u, image, image)) == set()
        assert _copies(lambda: rwkv_kernels.bi_wkv(log_decay, u, columns, columns)) == set()
        every_second = torch.stack((image, image), -1).flatten(-2)[..., ::2]
        assert _copies(lambda: rwkv_kernels.bi_wkv(log_decay, u, every_second, image)) != set()


# ---- special values ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_nan_takes_its_channel_of_its_sequence_alone(value: float, dtype: torch.dtype, bi_backend: str) -> None:
    tensors = make(Problem(T=100, C=40, log_decay=EITHER_SIGN), dtype)
    clean = solve_by(tensors, bi_backend)
    k = tensors.k.clone()
    k[PLACE] = value
    found = solve_by(replace(tensors, k=k), bi_backend)
    hit = torch.zeros_like(k, dtype=torch.bool)
    hit[PLACE[0], :, PLACE[2]] = True
    for name in ("y", "gk", "gv"):
        assert torch.equal(found[name].isnan(), hit), name
        torch.testing.assert_close(found[name][~hit], clean[name][~hit], rtol=2e-2, atol=2e-2)
    for name in ("gu", "glog_decay"):
        assert torch.equal(found[name].isnan(), hit.any(0).any(0)), name


@pytest.mark.parametrize("argument", ["k", "v", "gy", "r", "log_decay", "u"])
def test_nan_is_in_the_same_places_as_in_the_oracle(argument: str, compiled_bi_backend: str) -> None:
    tensors = make(Problem(T=100, C=40, gated=True))
    value = getattr(tensors, argument)
    value[PLACE if value.dim() == 3 else 5] = torch.nan
    found, expected = solve_by(tensors, compiled_bi_backend), solve(tensors, reference.bi_wkv)
    for name, x in expected.items():
        assert torch.equal(found[name].isnan(), x.isnan()), name


@pytest.mark.parametrize("argument", ["log_decay", "u"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_a_nan_of_any_bits_stays_nan_in_16_bit_outputs(argument: str, bits: int, compiled_bi_backend: str) -> None:
    tensors = make(Problem(T=20, C=16), torch.bfloat16)
    getattr(tensors, argument)[5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found, expected = solve_by(tensors, compiled_bi_backend), solve(tensors, reference.bi_wkv)
    assert expected["y"][..., 5].isnan().all()
    for name, x in expected.items():
        assert torch.equal(found[name].isnan(), x.isnan()), name


def test_a_key_of_minus_infinity_has_no_weight(bi_backend: str) -> None:
    tensors = make(Problem(T=100, C=40, log_decay=EITHER_SIGN))
    tensors.k[PLACE] = tensors.k[0, :60, 3] = tensors.k[1, 30:, 7] = -torch.inf
    found, expected = solve_by(tensors, bi_backend), solve(tensors.exact(), direct)
    for name in ("y", "gv"):
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-4)


def test_a_channel_without_any_weight_is_zero_over_zero(bi_backend: str) -> None:
    tensors = make(Problem(T=100, C=40))
    tensors.k[0, :, 3] = -torch.inf
    y = rwkv_kernels.bi_wkv(*tensors.inputs, backend=bi_backend)
    assert y[0, :, 3].isnan().all() and int(y.isnan().sum()) == 100


@pytest.mark.parametrize("k_scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("log_decay", [-torch.inf, -1e30, -1e4, -1.0, 0.0, 1e4, 1e30, torch.inf])
@pytest.mark.parametrize("u", [-1e4, 0.0, 1e4])
def test_extremes_stay_finite(k_scale: float, log_decay: float, u: float, bi_backend: str) -> None:
    tensors = make(Problem(T=70, C=16, k_scale=k_scale, log_decay=log_decay, u=u, gated=True))
    tensors.k.clamp_(-1e4, 1e4)
    for name, x in solve_by(tensors, bi_backend).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("log_decay", [1e28, 1e38, torch.inf])
def test_beyond_the_bound_of_growth_the_farthest_step_alone_counts(
    log_decay: float, dtype: torch.dtype, bi_backend: str
) -> None:
    """And its gradient ends there, as the log-decay is held."""
    tensors = make(Problem(T=70, C=16, log_decay=log_decay), dtype)
    found = solve_by(tensors, bi_backend)
    v = tensors.v
    assert torch.equal(found["y"][:, :35], v[:, -1:].expand(2, 35, 16))
    assert torch.equal(found["y"][:, 35:], v[:, :1].expand(2, 35, 16))
    assert not found["glog_decay"].any()


@pytest.mark.parametrize("log_decay", [33.3, 1000.1, 12345.6, 1e6 + 0.3, 1e12])
def test_growth_over_many_steps_stays_in_range(log_decay: float, compiled_bi_backend: str) -> None:
    """The maximum's roundings are all of one sign, and sums that follow them would overflow."""
    T = 4096
    tensors = make(Problem(B=1, T=T, C=16, log_decay=log_decay))
    found = solve_by(tensors, compiled_bi_backend)
    for name, x in found.items():
        assert x.isfinite().all(), name
    for half, farthest in ((slice(0, T // 2), -1), (slice(T // 2, T), 0)):
        expected = tensors.v[:, farthest, None].expand(1, T // 2, 16)
        torch.testing.assert_close(found["y"][:, half], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("log_decay", [-1e28, -1e38, -torch.inf])
def test_beyond_the_bound_of_decay_the_neighbours_alone_count(
    log_decay: float, dtype: torch.dtype, bi_backend: str
) -> None:
    tensors = make(Problem(T=70, C=16, log_decay=log_decay), dtype)
    strong = replace(tensors.exact(), log_decay=torch.full((16,), -1e6, dtype=torch.float64))
    found, near = solve_by(tensors, bi_backend), solve(strong, direct)
    allowed = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found["y"].double(), near["y"], rtol=allowed, atol=8 * allowed)
    assert not found["glog_decay"].any()


def test_large_values_do_not_overflow(compiled_bi_backend: str) -> None:
    tensors = make(Problem(T=50))
    tensors.v *= 1e37 / tensors.v.abs().max()
    y = rwkv_kernels.bi_wkv(*tensors.inputs, backend=compiled_bi_backend)
    assert y.isfinite().all() and y.abs().max() <= 1.001e37


# ---- bad input ----

Change = Callable[[dict[str, Any]], None]


def _set(name: str, value: Any) -> Change:
    return lambda arguments: arguments.update({name: value})


WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "k_of_rank_2": (_set("k", torch.zeros(2, 3)), ValueError, r"k: expected shape \[B, T, C\], got \[2, 3\]"),
    "v_of_other_T": (_set("v", torch.zeros(2, 5, 19)), ValueError, r"v: expected shape .* as k, got \[2, 5, 19\]"),
    "v_of_other_dtype": (_set("v", torch.zeros(2, 37, 19).half()), TypeError, "v: expected torch.float32 as k, got"),
    "r_of_other_dtype": (_set("r", torch.zeros(2, 37, 19).half()), TypeError, "r: expected torch.float32 as k, got"),
    "log_decay_of_other_C": (
        _set("log_decay", torch.zeros(20)),
        ValueError,
        r"log_decay: expected shape \[C\] = \[19\]",
    ),
    "log_decay_of_integers": (
        _set("log_decay", torch.zeros(19).int()),
        TypeError,
        "log_decay: expected float32.*int32",
    ),
    "log_decay_a_number": (_set("log_decay", -0.1), TypeError, "log_decay: expected a torch.Tensor, got float"),
    "log_decay_elsewhere": (
        _set("log_decay", torch.zeros(19, device="meta")),
        ValueError,
        "log_decay: expected device",
    ),
    "u_complex": (_set("u", torch.zeros(19, dtype=torch.complex64)), TypeError, "u: expected float32.*complex64"),
    "boundaries_of_B_2": (_set("cu_seqlens", torch.tensor([0, 37])), ValueError, r"k: expected shape \[1, total, C\]"),
    "boundaries_of_floats": (
        _set("cu_seqlens", torch.zeros(2)),
        (TypeError, ValueError),
        r"cu_seqlens: expected int32 or int64|k: expected shape \[1, total, C\]",
    ),
    "backend_unknown": (_set("backend", "tpu"), ValueError, "backend 'tpu' is unknown. Known: auto, .*cpu, reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bi_wkv_explains_what_is_wrong(name: str, bi_backend: str) -> None:
    arguments: dict[str, Any] = {
        **dict(zip(("log_decay", "u", "k", "v"), make(Problem()).inputs, strict=True)),
        "backend": bi_backend,
    }
    change, error, message = WRONG[name]
    change(arguments)
    with pytest.raises(error, match=message):
        rwkv_kernels.bi_wkv(**arguments)


@pytest.mark.parametrize("bad", [(1, 6), (0, 7), (0, 5), (0, 4, 2, 6)])
def test_bad_boundaries_are_refused_on_the_cpu(bad: tuple[int, ...]) -> None:
    tensors = make(Problem(B=1, T=6))
    with pytest.raises(ValueError, match="cu_seqlens: expected to (start at 0|end at 6|rise)"):
        rwkv_kernels.bi_wkv(*tensors.inputs, cu_seqlens=torch.tensor(bad), backend="cpu")
    with pytest.raises(RuntimeError, match="cu_seqlens: expected to (start at 0|end at 6|rise)"):
        torch.ops.rwkv_kernels.bi_wkv_forward(*tensors.inputs, None, torch.tensor(bad), True)


def test_the_direct_operator_names_its_arguments() -> None:
    tensors = make(Problem())
    log_decay, u, k, v = tensors.inputs
    with pytest.raises(RuntimeError, match=r"log_decay: expected shape \[19\], got \[18\]"):
        torch.ops.rwkv_kernels.bi_wkv_forward(log_decay[1:], u, k, v, None, None, False)
    _, checkpoints = torch.ops.rwkv_kernels.bi_wkv_forward(log_decay, u, k, v, None, None, True)
    with pytest.raises(RuntimeError, match="checkpoints: expected shape"):
        torch.ops.rwkv_kernels._bi_wkv_backward(log_decay, u, k, v, None, None, checkpoints[:, :, :3], k)


def test_a_gpu_tensor_never_falls_back_silently() -> None:
    lacking = [x.name for x in rwkv_kernels.backends() if x.name in ("cuda", "triton")]
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, device="cuda")
        parameter = torch.empty(3, device="cuda")
        for name in ("auto", "cpu", *lacking):
            with pytest.raises(
                rwkv_kernels.BackendUnavailable,
                match=f"bi_wkv backend '{name}' refused .*Available for this call: .*reference",
            ):
                rwkv_kernels.bi_wkv(parameter, parameter, x, x, backend=name)
