"""The drop-ins by their originals' conventions: against plain sums in float64, and fla's against fla's own kernel."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_tensor_close, tolerance
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.compat import blinkdl, fla, infctx, rwkv_pip
from rwkv_kernels.compat import transformers as huggingface
from rwkv_kernels.nn import RWKV, RWKVState

B, T, C = 3, 13, 8


def _inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"w": [C], "u": [C], "k": [B, T, C], "v": [B, T, C], "gy": [B, T, C], "gN": [B, C], "gD": [B, C]}
    normal = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x.to(dtype if name in ("k", "v", "gy") else torch.float64) for name, x in normal.items()}


def _given_state() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    num, den, top = torch.randn(3, B, C, generator=draw, dtype=torch.float64)
    return num, den.exp(), top


def _sums(x: dict[str, Tensor], N: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, C] and the sums after, as the paper writes them."""
    decay, y = torch.exp(-torch.exp(x["w"])), []
    for k, v in zip(x["k"].double().unbind(1), x["v"].double().unbind(1), strict=True):
        now = torch.exp(x["u"] + k)
        y.append((N + now * v) / (D + now))
        N, D = decay * N + k.exp() * v, decay * D + k.exp()
    return torch.stack(y, 1), N, D


def _loss(x: dict[str, Tensor], y: Tensor, N: Tensor, D: Tensor) -> Tensor:
    return (x["gy"].double() * y.double()).sum() + (x["gN"] * N + x["gD"] * D).sum()


# ---- calls with a state ----


def _call_infctx(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, after = infctx.wkv(w, u, k, v, state)
    return y, after


CALLS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[[Any], Tensor], Callable[[Tensor], Any]]] = {
    "infctx": (_call_infctx, infctx.import_state, infctx.export_state),
    "fla": (fla.fused_recurrent_rwkv4, fla.import_state, fla.export_state),
}


@pytest.mark.parametrize("origin", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_state_and_gradients_are_exact(origin: str, dtype: torch.dtype) -> None:
    call, import_state, export_state = CALLS[origin]
    x = _inputs(dtype)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    given = export_state(torch.stack([part.to(state_dtype) for part in _given_state()], 1))
    names = ["w", "u", "k", "v"]
    leaves = [x[name].clone().requires_grad_() for name in names] + [given.clone().requires_grad_()]
    y, after = call(*leaves)
    assert y.dtype == dtype and after.dtype == state_dtype and after.shape == given.shape
    num, den, top = import_state(after.double()).unbind(1)
    N, D = num * top.exp(), den * top.exp()
    found = torch.autograd.grad(_loss(x, y, N, D), leaves)

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    num, den, top = import_state(exact_leaves[4]).unbind(1)
    exact_y, exact_N, exact_D = _sums(
        x | dict(zip(names, exact_leaves, strict=False)), num * top.exp(), den * top.exp()
    )
    exact = torch.autograd.grad(_loss(x, exact_y, exact_N, exact_D), exact_leaves)
    for name, ours, theirs in zip(["y", "N", "D"], [y, N, D], [exact_y, exact_N, exact_D], strict=True):
        assert_tensor_close(name, ours, theirs, tolerance(dtype if name == "y" else state_dtype, T, 10))
    for name, leaf, ours, theirs in zip([*names, "state"], leaves, found, exact, strict=True):
        assert ours.dtype == leaf.dtype
        precision = dtype if name in ("k", "v") else state_dtype
        assert_tensor_close(f"gradient of {name}", ours, theirs, tolerance(precision, T, 10))


def test_fla_takes_a_state_of_any_precision_and_returns_an_exact_one() -> None:
    x = _inputs(torch.bfloat16)
    state = fla.export_state(torch.stack(_given_state(), 1))
    _, after = fla.fused_recurrent_rwkv4(x["w"], x["u"], x["k"], x["v"], state.bfloat16())
    assert after.dtype == torch.float32
    num, den, top = _given_state()
    given = [part.bfloat16().double() for part in (num, den, top)]
    _, N, D = _sums(x, given[0] * given[2].exp(), given[1] * given[2].exp())
    num, den, top = fla.import_state(after.double()).unbind(1)
    assert_tensor_close("N", num * top.exp(), N, tolerance(torch.float32, T, 10))
    assert_tensor_close("D", den * top.exp(), D, tolerance(torch.float32, T, 10))


# ---- RWKV-LM ----


@pytest.mark.parametrize("call", [blinkdl.RUN_CUDA, blinkdl.WKV.apply], ids=["RUN_CUDA", "WKV.apply"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_run_cuda_is_exact_from_an_empty_state(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = _inputs(dtype)
    leaves = [x[name].clone().requires_grad_() for name in ("w", "u", "k", "v")]
    y = call(B, T, C, *leaves)
    found = torch.autograd.grad((x["gy"].double() * y.double()).sum(), leaves)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_y, _, _ = _sums(dict(zip("wukv", exact_leaves, strict=True)), torch.zeros(B, C), torch.zeros(B, C))
    exact = torch.autograd.grad((x["gy"].double() * exact_y).sum(), exact_leaves)
    assert y.dtype == dtype
    assert_tensor_close("y", y, exact_y, tolerance(dtype, T, 10))
    for name, ours, theirs in zip("wukv", found, exact, strict=True):
        assert_tensor_close(f"gradient of {name}", ours, theirs, tolerance(dtype, T, 10))


@pytest.mark.parametrize(
    ("mode", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)]
)
def test_run_cuda_returns_the_dtype_of_the_float_mode(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_FLOAT_MODE", mode)
    x = _inputs(torch.float32)
    assert blinkdl.RUN_CUDA(B, T, C, x["w"], x["u"], x["k"], x["v"]).dtype == dtype


def test_run_cuda_checks_its_sizes() -> None:
    x = _inputs()
    with pytest.raises(ValueError, match=r"k: expected shape \[B, T, C\] = \[3, 13, 9\], got \[3, 13, 8\]"):
        blinkdl.RUN_CUDA(B, T, C + 1, x["w"], x["u"], x["k"], x["v"])


# ---- the rwkv package ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_cuda_wkv_moves_its_state_on_in_place(dtype: torch.dtype) -> None:
    x = _inputs(dtype)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    aa, bb, pp = (part[0].to(state_dtype) for part in _given_state())
    N, D = aa.double() * pp.double().exp(), bb.double() * pp.double().exp()
    w = -torch.exp(x["w"].to(state_dtype))
    k, v = x["k"][0], x["v"][0]
    y, *returned = rwkv_pip.cuda_wkv(T, C, w, x["u"].to(state_dtype), k, v, aa, bb, pp)
    assert all(a is b for a, b in zip(returned, (aa, bb, pp), strict=True))
    assert y.dtype == dtype and list(y.shape) == [T, C]
    exact = x | {"k": k[None], "v": v[None], "w": (-w.double()).log(), "u": x["u"].to(state_dtype).double()}
    exact_y, exact_N, exact_D = _sums(exact, N[None], D[None])
    assert_tensor_close("y", y, exact_y[0], tolerance(dtype, T, 10))
    for name, found, expected in (("N", aa, exact_N), ("D", bb, exact_D)):
        assert_tensor_close(name, found.double() * pp.double().exp(), expected[0], tolerance(state_dtype, T, 10))


def test_cuda_wkv_takes_a_decay_of_zero() -> None:
    k, v = torch.zeros(T, C), torch.arange(T).float()[:, None].expand(T, C)
    aa, bb, pp = torch.zeros(C), torch.zeros(C), torch.full((C,), -1e30)
    y, *_ = rwkv_pip.cuda_wkv(T, C, torch.zeros(C), torch.zeros(C), k, v, aa, bb, pp)
    assert_tensor_close("y", y, v.double().cumsum(0) / torch.arange(1, T + 1)[:, None], tolerance(torch.float32, T, 0))
    assert_tensor_close("den", bb * pp.exp(), torch.full((C,), float(T)), tolerance(torch.float32, T, 0))


def test_cuda_wkv_takes_parameters_and_refuses_wrong_sizes() -> None:
    x = _inputs(torch.float32)
    state = [torch.zeros(C), torch.zeros(C), torch.full((C,), -1e30)]
    w = torch.nn.Parameter(-torch.exp(x["w"]).float())
    y, *_ = rwkv_pip.cuda_wkv(T, C, w, x["u"], x["k"][0], x["v"][0], *state)
    assert not y.requires_grad
    with pytest.raises(ValueError, match=r"k: expected shape \[T, C\] = \[12, 8\]"):
        rwkv_pip.cuda_wkv(T - 1, C, w, x["u"], x["k"][0], x["v"][0], *state)
    with pytest.raises(ValueError, match=r"aa: expected shape \[C\], got \[1, 8\]"):
        rwkv_pip.cuda_wkv(T, C, w, x["u"], x["k"][0], x["v"][0], *(part[None] for part in state))


# ---- from TorchScript ----


class _ScriptedInfctx(torch.nn.Module):
    def forward(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = infctx.wkv(w, u, torch.sigmoid(k), v, state)
        return torch.sigmoid(y), after


def test_infctx_is_called_from_torchscript_with_every_gradient(tmp_path: Path) -> None:
    x = _inputs()
    leaves = [x[name].requires_grad_() for name in ("w", "u", "k", "v")]
    leaves.append(infctx.export_state(torch.stack(_given_state(), 1)).requires_grad_())
    scripted = torch.jit.script(_ScriptedInfctx())
    scripted.save(tmp_path / "scripted.pt")
    expected = _ScriptedInfctx()(*leaves)
    gradients = torch.autograd.grad([part.sum() for part in expected], leaves)
    callers = [scripted, torch.jit.load(tmp_path / "scripted.pt"), torch.jit.freeze(scripted.eval())]
    # The first calls are profiled, and the later ones differentiated by TorchScript where it can.
    for caller in [scripted, scripted, *callers]:
        found = caller(*leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for a, b in zip(torch.autograd.grad([part.sum() for part in found], leaves), gradients, strict=True):
            assert_tensor_close("gradient", a, b, 1e-14)


def _cuda_wkv_and_more(
    T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, aa, bb, pp = rwkv_pip.cuda_wkv(T, C, w, u, k, v, aa, bb, pp)
    # Another use of the state, which must read its value after the call.
    return y, aa + 0, bb, pp


def test_cuda_wkv_is_called_from_torchscript_and_moves_its_state_on_in_place() -> None:
    x = _inputs(torch.float32)
    arguments = [-x["w"].exp().float(), x["u"].float().requires_grad_(), x["k"][0], x["v"][0]]
    scripted = torch.jit.script(_cuda_wkv_and_more)
    ours, theirs = ([part[0].float() for part in _given_state()] for _ in range(2))
    for _ in range(3):
        expected, *_ = rwkv_pip.cuda_wkv(T, C, *arguments, *theirs)
        y, aa, bb, pp = scripted(T, C, *arguments, *ours)
        assert torch.equal(y, expected) and not y.requires_grad
        assert torch.equal(aa, ours[0]) and bb is ours[1] and pp is ours[2]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_errors_reach_the_caller_from_torchscript() -> None:
    x, state = _inputs(torch.float32), [torch.zeros(C) for _ in range(3)]
    arguments = [-x["w"].exp().float(), x["u"].float(), x["k"][0], x["v"][0]]
    scripted = torch.jit.script(_cuda_wkv_and_more)
    with pytest.raises(torch.jit.Error, match=r"k: expected shape \[T, C\] = \[12, 8\], got \[13, 8\]"):
        scripted(T - 1, C, *arguments, *state)
    with pytest.raises(torch.jit.Error, match=r"aa: expected shape \[C\], got \[1, 8\]"):
        scripted(T, C, *arguments, *(part[None] for part in state))
    arguments[1] = arguments[1][:3]
    with pytest.raises(RuntimeError, match=r"u: expected shape \[C\] = \[8\], got \[3\]"):
        scripted(T, C, *arguments, *state)


# ---- states ----


def _model_state(sequences: int) -> RWKVState:
    draw = torch.Generator().manual_seed(2)
    shapes = ([4, sequences, C], [4, sequences, C], [4, sequences, 3, C])
    return RWKVState(*(torch.randn(shape, generator=draw) for shape in shapes))


@pytest.mark.parametrize("origin", [blinkdl, infctx, rwkv_pip, huggingface], ids=lambda module: module.__name__)
def test_model_states_survive_the_way_there_and_back(origin: Any) -> None:
    state = _model_state(1 if origin in (blinkdl, rwkv_pip) else B)
    exported = origin.export_model_state(state)
    back = origin.import_model_state(*exported) if origin is infctx else origin.import_model_state(exported)
    assert all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(back, state, strict=True))


@pytest.mark.parametrize("origin", [blinkdl, infctx, rwkv_pip, huggingface], ids=lambda module: module.__name__)
def test_an_exported_state_may_be_written_to(origin: Any) -> None:
    state = _model_state(1)
    for tensor in origin.export_model_state(state):
        tensor += 1
    assert all(torch.equal(x, y) for x, y in zip(state, _model_state(1), strict=True))


def test_model_states_have_their_parts_where_the_originals_have_them() -> None:
    state, layer, b = _model_state(1), 2, 0
    att, ffn = state.att_shift[layer, b], state.ffn_shift[layer, b]
    num, den, top = state.wkv[layer, b]
    rows = blinkdl.export_model_state(state)
    assert list(rows.shape) == [20, C]
    for found, expected in zip(rows[5 * layer : 5 * layer + 5], (ffn, att, num, den, top), strict=True):
        assert torch.equal(found, expected)
    parts = rwkv_pip.export_model_state(state)
    assert len(parts) == 20
    for found, expected in zip(parts[5 * layer : 5 * layer + 5], (att, num, den, top, ffn), strict=True):
        assert torch.equal(found, expected)
    five = huggingface.export_model_state(state)
    for found, expected in zip(five, (ffn, att, num, den, top), strict=True):
        assert list(found.shape) == [1, C, 4] and torch.equal(found[b, :, layer], expected)
    shift_states, wkv_states = infctx.export_model_state(state)
    assert torch.equal(shift_states[layer, :, b], torch.stack((att, ffn)))
    assert torch.equal(wkv_states[layer, b], torch.stack((num, den, top), 1))


def test_a_state_of_transformers_continues_here_and_the_other_way_round() -> None:
    models = pytest.importorskip("transformers_models")
    theirs, tokens = models.make(), models.tokens(B, T)
    model = RWKV.from_state_dict({models.rwkv_lm_name(name): x for name, x in theirs.state_dict().items()})
    whole, _ = model(tokens)
    with huggingface.patched():
        state = huggingface.import_model_state(theirs(tokens[:, :5], use_cache=True).state)
        assert_tensor_close("here", model(tokens[:, 5:], state)[0], whole[:, 5:], 1e-11)
        exported = huggingface.export_model_state(model(tokens[:, :5])[1])
        assert_tensor_close("there", theirs(tokens[:, 5:], state=exported).logits, whole[:, 5:], 1e-11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: infctx.import_state(torch.zeros(B, 3, C)), r"expected shape \[B, C, 3\], got \[3, 3, 8\]"),
        (lambda: infctx.export_state(torch.zeros(B, C, 3)), r"expected shape \[B, 3, C\], got \[3, 8, 3\]"),
        (lambda: infctx.import_model_state(torch.zeros(4, B, C), torch.zeros(4, B, C, 3)), r"\[L, 2, B, C\], got"),
        (lambda: fla.import_state(torch.zeros(B, 3, C)), r"expected shape \[B, 3, 1, C\], got \[3, 3, 8\]"),
        (lambda: fla.export_state(torch.zeros(B, 3, 1, C)), r"expected shape \[B, 3, C\], got"),
        (lambda: blinkdl.import_model_state(torch.zeros(4, C)), r"expected shape \[5 L, C\] as RWKV_RNN returns"),
        (lambda: blinkdl.export_model_state(_model_state(2)), r"expected one sequence, got 2; RWKVState.take picks"),
        (lambda: rwkv_pip.export_model_state(_model_state(2)), r"expected one sequence, got 2; RWKVState.take picks"),
        (lambda: rwkv_pip.export_state(torch.zeros(B, 3, C)), r"expected one sequence \[1, 3, C\], got \[3, 3, 8\]"),
        (lambda: rwkv_pip.import_model_state([torch.zeros(C)] * 3), "five tensors .* for each layer .* got 3"),
        (
            lambda: huggingface.import_model_state([torch.zeros(B, C)] * 3),
            r"five tensors \[B, C, L\] .* got \[\[3, 8\]",
        ),
    ],
)
def test_states_of_another_layout_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(B, C, 3), ValueError, r"got \[3, 8, 3\]; rwkv_kernels.compat.infctx.import_state converts it"),
        (torch.zeros(B, 3, 1, C), ValueError, r"rwkv_kernels.compat.fla.import_state converts it"),
        ([torch.zeros(B, C)] * 3, TypeError, r"compat.transformers.import_state converts \[num, den, max\]"),
    ],
    ids=["infctx", "fla", "transformers"],
)
def test_wkv_names_the_converter_of_a_state_that_it_cannot_take(
    state: Any, error: type[Exception], message: str
) -> None:
    x = _inputs(torch.float32)
    with pytest.raises(error, match=message):
        rwkv_kernels.wkv(x["w"], x["u"], x["k"], x["v"], state)


def test_the_model_names_the_converters_of_states_that_it_cannot_take() -> None:
    model, state = RWKV(5, C, 4), huggingface.export_model_state(_model_state(1))
    with pytest.raises(ValueError, match=r"expected an RWKVState, got list; import_model_state of rwkv_kernels.compat"):
        model(torch.zeros(1, 2, dtype=torch.int64), state)


# ---- an original itself; more of them are in test_originals.py ----


def test_equals_flas_own_kernel_in_the_interpreter() -> None:
    """In a new process: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    pytest.importorskip("fla.ops.rwkv4")
    program = Path(__file__).parent / "fla_program.py"
    paths = [str(Path(rwkv_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
