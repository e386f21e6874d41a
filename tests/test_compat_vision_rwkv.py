"""Vision-RWKV's drop-in: RUN_CUDA by the paper's sums, and `published` by the kernel's, a thread after the other."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_tensor_close, tolerance
from torch import Tensor

from rwkv_kernels import bi_wkv
from rwkv_kernels.compat.vision_rwkv import RUN_CUDA, published

B, C = 2, 5
NAMES = ("w", "u", "k", "v")


def _inputs(T: int, decay: float, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """w, u, k and v, w around the decay, and gy."""
    draw = torch.Generator().manual_seed(T)
    w, u, k, v, gy = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ([C], [C], [B, T, C], [B, T, C], [B, T, C])
    )
    return [(decay * (1 + 0.2 * w)).to(dtype), u.to(dtype), k.to(dtype), v.to(dtype)], gy.to(dtype)


def _with_gradients(function: Any, inputs: list[Tensor], gy: Tensor) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, gy.to(y.dtype))
    return {"y": y.detach(), **{f"gradient of {x}": g for x, g in zip(NAMES, gradients, strict=True)}}


def _paper(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, a step after the other, in float64."""
    w, u, k, v = (x.double() for x in (w, u, k, v))
    y = []
    for t in range(k.shape[1]):
        logits = torch.stack([-(abs(t - s) - 1) * w if s != t else u for s in range(k.shape[1])]) + k
        y.append((logits.softmax(1) * v).sum(1))
    return torch.stack(y, 1)


@pytest.mark.parametrize("decay", [0.3, -0.1], ids=["falling", "growing"])
@pytest.mark.parametrize("sizes", [False, True], ids=["four arguments", "seven"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_run_cuda_is_the_formula_of_the_paper(dtype: torch.dtype, sizes: bool, decay: float) -> None:
    T = 13
    inputs, gy = _inputs(T, decay, dtype)
    call = (lambda *x: RUN_CUDA(B, T, C, *x)) if sizes else RUN_CUDA
    found, exact = _with_gradients(call, inputs, gy), _with_gradients(_paper, [x.double() for x in inputs], gy.double())
    for name, x in found.items():
        assert x.dtype == dtype
        assert_tensor_close(name, x, exact[name], tolerance(dtype, T, 10))


def test_run_cuda_returns_the_dtype_of_the_decay() -> None:
    (w, u, k, v), _ = _inputs(5, 0.1, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        assert RUN_CUDA(w.to(dtype), u.to(dtype), k.half(), v.half()).dtype == dtype
        assert published(w.to(dtype), u.to(dtype), k.half(), v.half()).dtype == dtype


def test_run_cuda_compiles_into_one_graph() -> None:
    inputs, gy = _inputs(13, 0.1)
    compiled = torch.compile(RUN_CUDA, fullgraph=True, backend="aot_eager")
    for name, x in _with_gradients(compiled, inputs, gy).items():
        torch.testing.assert_close(x, _with_gradients(RUN_CUDA, inputs, gy)[name])


def test_run_cuda_checks_its_arguments() -> None:
    inputs, _ = _inputs(13, 0.1)
    with pytest.raises(ValueError, match=r"k: expected shape \[B, T, C\] = \[2, 12, 5\], got \[2, 13, 5\]"):
        RUN_CUDA(B, 12, C, *inputs)
    with pytest.raises(TypeError, match="got 3 arguments"):
        RUN_CUDA(*inputs[:3])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"w: expected a torch.Tensor, got float"):
        RUN_CUDA(0.1, *inputs[1:])  # type: ignore[call-overload]


def _thread_after_thread(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """y and 1/denominator, [B, T, C], as the kernel's 32 threads compute them, with bare exponentials."""
    T = k.shape[1]
    steps = math.ceil(T / 32)
    keys, v_and_1 = k.unbind(1), torch.stack((v, torch.ones_like(v))).unbind(2)
    y, reciprocals = [], []
    for begin in range(0, T, steps):
        # All logits that the thread has added or taken out, of which the largest is the scale of 1e-6.
        seen = [keys[s] - w * abs(s - begin) for s in range(T)]
        past = sum((x.exp() * v_and_1[s] for s, x in enumerate(seen[:begin])), torch.zeros_like(v_and_1[0]))
        future = sum((x.exp() * v_and_1[s] for s, x in enumerate(seen) if s > begin), torch.zeros_like(past))
        before, after = seen[:begin], seen[begin:]
        for t in range(begin, min(begin + steps, T)):
            if t > begin:
                # Its weight there is e^{k - w}: this takes out e^w times as much.
                future = (future - keys[t].exp() * v_and_1[t]) * w.exp()
                after = [x + w for x in [*after, keys[t]]]
            now = u + keys[t]
            largest = torch.stack([*before, *after, now]).amax(0).detach()
            num, den = past + future + now.exp() * v_and_1[t]
            reciprocals.append(1 / (den + 1e-6 * largest.exp()))
            y.append(num * reciprocals[-1])
            past = past * (-w).exp() + keys[t].exp() * v_and_1[t]
            before = [x - w for x in before] + [keys[t]]
    return torch.stack(y, 1), torch.stack(reciprocals, 1)


def _kernel(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> dict[str, Tensor]:
    """The published kernel's y and gradients: those of k and v by the paper's weights."""
    w, u = w.clone().requires_grad_(), u.clone().requires_grad_()
    y, z = _thread_after_thread(w, u, k, v)
    gw, gu = torch.autograd.grad(y, (w, u), gy, materialize_grads=True)
    y, z = y.detach(), z.detach()
    gk, gv = torch.zeros_like(k), torch.zeros_like(v)
    for t in range(k.shape[1]):
        for s in range(k.shape[1]):
            weight = (k[:, t] + (u if s == t else -w * (abs(t - s) - 1))).detach().exp() * z[:, s] * gy[:, s]
            gk[:, t] += weight * (v[:, t] - y[:, s])
            gv[:, t] += weight
    return dict(zip(("y", *(f"gradient of {x}" for x in NAMES)), (y, gw, gu, gk, gv), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.02, 0.4, -0.05])
@pytest.mark.parametrize("T", [1, 2, 32, 33, 70, 97])
def test_published_is_what_the_threads_of_the_kernel_compute(T: int, decay: float) -> None:
    inputs, gy = _inputs(T, decay)
    found = _with_gradients(published, inputs, gy)
    for name, exact in _kernel(*inputs, gy).items():
        assert_tensor_close(name, found[name], exact, 1e-9)


def test_published_stays_finite_where_sums_would_not() -> None:
    inputs, gy = _inputs(70, 5.0)
    inputs[2] *= 300
    assert all(x.isfinite().all() for x in _with_gradients(published, inputs, gy).values())
    assert published(*(x[:, :0] if x.dim() == 3 else x for x in inputs)).shape == (B, 0, C)


def test_up_to_32_tokens_the_kernel_is_the_formula_with_another_bonus() -> None:
    (w, u, k, v), _ = _inputs(32, 0.3)
    torch.testing.assert_close(published(w, u, k, v), RUN_CUDA(w, u + w, k, v), rtol=1e-5, atol=1e-5)
    (w, u, k, v), _ = _inputs(33, 0.3)
    assert (published(w, u, k, v) - RUN_CUDA(w, u + w, k, v)).abs().max() > 1e-2


def test_the_gradients_of_the_keys_are_those_of_neither() -> None:
    inputs, gy = _inputs(70, 0.2)
    as_published, exact = _with_gradients(published, inputs, gy), _with_gradients(RUN_CUDA, inputs, gy)
    gk = as_published["gradient of k"]
    step = 1e-6 * torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nudged = [published(inputs[0], inputs[1], inputs[2] + sign * step, inputs[3]) for sign in (1, -1)]
    along = float(((nudged[0] - nudged[1]) / 2 * gy).sum() / (gk * step).sum())
    assert abs(along - 1) > 1e-2 and (gk - exact["gradient of k"]).abs().max() > 1e-2


def test_rows_and_columns_of_an_image_are_views() -> None:
    H, W = 3, 4
    (w, u, _, _), _ = _inputs(1, 0.3)
    k, v = torch.randn(2, B, H, W, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    rows = bi_wkv(-w, u, k.view(B * H, W, C), v.view(B * H, W, C)).view(B, H, W, C)
    columns = bi_wkv(-w.repeat(W), u.repeat(W), k.view(B, H, W * C), v.view(B, H, W * C)).view(B, H, W, C)
    for h in range(H):
        torch.testing.assert_close(rows[:, h], bi_wkv(-w, u, k[:, h], v[:, h]))
    for x in range(W):
        torch.testing.assert_close(columns[:, :, x], bi_wkv(-w, u, k[:, :, x], v[:, :, x]))


def test_the_snippet_of_the_migration_measures_what_the_switch_changes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
    code = re.findall(r"```python\n((?:.*\n)*?)```", text[text.index("\n*A checkpoint that was trained with") :])[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["change"].shape == (64,) and 1e-4 < names["change"].max() < 1e-2
