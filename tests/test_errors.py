"""Bad input: the exception's type and its message: the argument, the expected value and the given one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, make

import rwkv_kernels

Change = Callable[[dict[str, Any]], None]


def _set(name: str, value: Any) -> Change:
    return lambda arguments: arguments.update({name: value})


ELSEWHERE = "expected device (cpu|cuda:0) as k, got meta"

WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "k_of_rank_2": (_set("k", torch.zeros(2, 3)), ValueError, r"k: expected shape \[B, T, C\], got \[2, 3\]"),
    "v_of_other_T": (_set("v", torch.zeros(2, 5, 19)), ValueError, r"v: expected shape .* as k, got \[2, 5, 19\]"),
    "v_of_other_dtype": (_set("v", torch.zeros(2, 37, 19).half()), TypeError, "v: expected torch.float32 as k, got"),
    "v_on_another_device": (_set("v", torch.zeros(2, 37, 19, device="meta")), ValueError, f"v: {ELSEWHERE}"),
    "w_of_other_C": (_set("w", torch.zeros(20)), ValueError, r"w: expected shape \[C\] = \[19\], got \[20\]"),
    "w_of_rank_2": (_set("w", torch.zeros(1, 19)), ValueError, r"w: expected shape \[C\]"),
    "w_on_another_device": (_set("w", torch.zeros(19, device="meta")), ValueError, f"w: {ELSEWHERE}"),
    "u_of_integers": (_set("u", torch.zeros(19, dtype=torch.int64)), TypeError, "u: expected float32.*got torch.int64"),
    "u_complex": (_set("u", torch.zeros(19, dtype=torch.complex64)), TypeError, "u: expected float32.*complex64"),
    "k_of_integers": (_set("k", torch.zeros(2, 37, 19, dtype=torch.int32)), TypeError, "k: expected float32.*int32"),
    "k_not_a_tensor": (_set("k", [[0.0]]), TypeError, "k: expected a torch.Tensor, got list"),
    "w_missing": (_set("w", None), TypeError, "w: expected a torch.Tensor, got NoneType"),
    "state_of_other_shape": (_set("state", torch.zeros(2, 19, 3)), ValueError, r"state: expected shape \[B, 3, C\]"),
    "state_of_other_dtype": (_set("state", torch.zeros(2, 3, 19).double()), TypeError, "state: expected torch.float32"),
    "state_on_another_device": (_set("state", torch.zeros(2, 3, 19, device="meta")), ValueError, f"state: {ELSEWHERE}"),
    "state_not_a_tensor": (_set("state", 3.0), TypeError, "state: expected a torch.Tensor, got float"),
    "backend_unknown": (_set("backend", "tpu"), ValueError, "backend 'tpu' is unknown. Known: auto, .*cpu, reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wkv_explains_what_is_wrong(name: str, backend: str) -> None:
    tensors = make(Problem(with_state=True))
    arguments: dict[str, Any] = {
        **dict(zip(["w", "u", "k", "v", "state"], tensors.inputs, strict=True)),
        "backend": backend,
    }
    change, error, message = WRONG[name]
    change(arguments)
    with pytest.raises(error, match=message):
        rwkv_kernels.wkv(**arguments)


WRONG_OF_STEP: dict[str, tuple[Change, type[Exception], str]] = {
    **{name: WRONG[name] for name in ("w_of_other_C", "u_of_integers", "state_of_other_shape", "backend_unknown")},
    "r_of_other_shape": (
        _set("r", torch.zeros(2, 20)),
        ValueError,
        r"r: expected shape \[B, C\] = \[2, 19\] as k, got \[2, 20\]",
    ),
    "r_of_rank_1": (_set("r", torch.zeros(19)), ValueError, r"r: expected shape \[B, C\] .* as k, got \[19\]"),
    "r_of_other_dtype": (_set("r", torch.zeros(2, 19).half()), TypeError, "r: expected torch.float32 as k, got"),
    "r_on_another_device": (_set("r", torch.zeros(2, 19, device="meta")), ValueError, f"r: {ELSEWHERE}"),
    "r_not_a_tensor": (_set("r", 1.0), TypeError, "r: expected a torch.Tensor, got float"),
}


@pytest.mark.parametrize("name", WRONG_OF_STEP)
def test_wkv_step_explains_what_is_wrong_and_leaves_the_state(name: str, backend: str) -> None:
    tensors = make(Problem(with_state=True))
    w, u, k, v, state = tensors.inputs
    assert state is not None
    before = state.clone()
    arguments: dict[str, Any] = {"w": w, "u": u, "k": k[:, 0], "v": v[:, 0], "state": state, "backend": backend}
    change, error, message = WRONG_OF_STEP[name]
    change(arguments)
    with pytest.raises(error, match=message):
        rwkv_kernels.wkv_step(**arguments)
    assert torch.equal(state, before)


@pytest.mark.parametrize("name", ["w", "u", "v", "state"])
def test_tensors_on_two_devices_are_refused(name: str, gpu_backend: str) -> None:
    w, u, k, v, state = make(Problem(with_state=True)).inputs
    arguments = {"w": w, "u": u, "k": k, "v": v, "state": state, "backend": gpu_backend}
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"{name}: expected device cuda:0 as k, got cpu"):
        rwkv_kernels.wkv(**arguments)


def test_tensors_of_the_cpu_are_refused_by_a_backend_of_the_gpu(gpu_backend: str) -> None:
    w, u, k, v, _ = make(Problem()).changed(torch.Tensor.cpu).inputs
    reason = (
        rf"wkv backend '{gpu_backend}' refused \({gpu_backend}: .*cpu.*\)\. Available for this call: cpu, reference"
    )
    with pytest.raises(rwkv_kernels.BackendUnavailable, match=reason):
        rwkv_kernels.wkv(w, u, k, v, backend=gpu_backend)


def test_tensors_of_the_gpu_are_refused_by_the_backend_of_the_cpu(gpu_backend: str) -> None:
    w, u, k, v, _ = make(Problem()).inputs
    with pytest.raises(
        rwkv_kernels.BackendUnavailable, match="k is on cuda:0, and this backend takes tensors on cpu or meta"
    ):
        rwkv_kernels.wkv(w, u, k, v, backend="cpu")


def test_wkv_step_wants_a_state_and_one_token(backend: str) -> None:
    w, u, k, v, state = make(Problem(with_state=True)).inputs
    with pytest.raises(TypeError, match="state: expected a torch.Tensor, got NoneType"):
        rwkv_kernels.wkv_step(w, u, k[:, 0], v[:, 0], None, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k: expected shape \[B, C\], got \[2, 37, 19\]"):
        rwkv_kernels.wkv_step(w, u, k, v, state, backend=backend)


@pytest.mark.parametrize("name", ["w", "u", "k", "v", "state", "r"])
def test_wkv_step_refuses_to_lose_a_gradient(name: str, backend: str) -> None:
    w, u, k, v, state = make(Problem(with_state=True)).inputs
    token = {name: x[:, 0].clone() for name, x in (("k", k), ("v", v), ("r", k))}
    arguments = {"w": w, "u": u, **token, "state": state}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected no gradient to be required by wkv_step"):
        rwkv_kernels.wkv_step(**arguments, backend=backend)
    with torch.no_grad():
        rwkv_kernels.wkv_step(**arguments, backend=backend)


def test_wkv_step_refuses_a_state_that_shares_memory(backend: str) -> None:
    w, u, k, v, _ = make(Problem()).inputs
    state = rwkv_kernels.empty_state(1, 19).expand(2, 3, 19)
    with pytest.raises(ValueError, match="state: .*expanded"):
        rwkv_kernels.wkv_step(w, u, k[:, 0], v[:, 0], state, backend=backend)


@pytest.mark.parametrize(("B", "T", "C"), [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 0, 0)])
def test_nothing_to_do_is_defined(B: int, T: int, C: int, backend: str) -> None:
    w, u = torch.zeros(C, requires_grad=True), torch.zeros(C)
    k = torch.zeros(B, T, C, requires_grad=True)
    y, state = rwkv_kernels.wkv(w, u, k, torch.zeros(B, T, C), return_state=True, backend=backend)
    assert y.shape == (B, T, C) and torch.equal(state, rwkv_kernels.empty_state(B, C))
    if backend != "reference":
        y.sum().backward()
        assert w.grad is not None and torch.equal(w.grad, torch.zeros(C))


# The type of a compiled operator's own errors depends on torch's version; the public functions define theirs.
OF_OPERATORS = (RuntimeError, ValueError, TypeError)


def test_the_operators_check_their_arguments_too(operators: Any) -> None:
    w, u, k, v, state = make(Problem(with_state=True)).inputs
    for wrong, message in [
        ((w[:3], u, k, v, state, True), "w: expected shape"),
        ((w, u, k, v[:, :5], state, True), "v: expected shape"),
        ((w, u, k[0], v[0], state, True), "k: expected shape"),
        ((w, u, k, v.double(), state, True), "v: expected .*float32"),
        ((w, u, k, v, state[:, :2], True), "state: expected shape"),
        ((w, u, k, v, state.double(), True), "state: expected .*float32"),
        ((w.long(), u, k, v, state, True), "w: expected float32"),
        ((w, u, k.long(), v.long(), state, True), "k.*float32"),
    ]:
        with pytest.raises(OF_OPERATORS, match=message):
            operators.forward(*wrong)
    kt, vt = k[:, 0], v[:, 0]
    for wrong_step, message in [
        ((w, u, k[0, 0], v[0, 0], state), "k: expected shape"),
        ((w, u, k, v, state), "k: expected shape"),
        ((w, u, kt, vt[:, :3], state), "v: expected shape"),
        ((w, u, kt, vt, state[:1]), "state: expected shape"),
        ((w, u, kt, vt, state, kt[:1]), "r: expected shape"),
        ((w, u, kt, vt, state, k), "r: expected shape"),
        ((w, u, kt, vt, state, kt.double()), "r: expected .*float32"),
    ]:
        with pytest.raises(OF_OPERATORS, match=message):
            operators.step(*wrong_step)
    checkpoints = operators.forward(w, u, k, v, state, True)[2]
    for wrong_backward in [
        (w, u, k, v, state, checkpoints.new_zeros(2, 5, 3, 19), v, None),
        (w, u, k, v, state, checkpoints, v[:, :3], None),
        (w, u, k, v, state, checkpoints, v, state[:1]),
    ]:
        with pytest.raises(OF_OPERATORS, match="expected shape"):
            operators.backward(*wrong_backward)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_empty_state_is_float32_or_float64(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="dtype: expected torch.float32 or torch.float64"):
        rwkv_kernels.empty_state(1, 2, dtype=dtype)
