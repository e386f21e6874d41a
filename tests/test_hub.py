"""The functions that Hugging Face's `kernels` loads: against the oracle, through the real package, and in transformers."""

from types import ModuleType
from typing import Any

import pytest
import torch
from problems import assert_tensor_close, tolerance
from torch import Tensor

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.compat import hub

T, C = 70, 12
DTYPES = {"": torch.float32, "_bf16": torch.bfloat16}


def _inputs(B: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As the kernel is called: w is the log-decay in float32, and u has k's dtype."""
    draw = torch.Generator().manual_seed(B)
    raw, u = (torch.randn(C, generator=draw) for _ in range(2))
    k, v, gy = (torch.randn(B, T, C, generator=draw).to(dtype) for _ in range(3))
    return {"w": -torch.exp(raw), "u": u.to(dtype), "k": k, "v": v, "gy": gy}


def _exact(x: dict[str, Tensor], state: Tensor | None = None) -> dict[str, Tensor]:
    """The oracle in float64, of the same numbers; state is [B, C, 3]."""
    raw = (-x["w"].double()).log()
    leaves = [y.double().requires_grad_() for y in (raw, x["u"], x["k"], x["v"])]
    y, after = reference.wkv(*leaves, None if state is None else state.double().transpose(1, 2))
    gradients = torch.autograd.grad(y, leaves, x["gy"].double())
    num, den, top = after.detach().unbind(1)
    return {"y": y.detach(), "mean": num / den, "log_den": den.log() + top} | dict(
        zip(("gw", "gu", "gk", "gv"), gradients, strict=True)
    )


def _allowed(dtype: torch.dtype) -> float:
    return tolerance(dtype, T, 10.0)


def _state(B: int, empty: bool) -> Tensor:
    """[B, C, 3], empty as transformers makes one, or any."""
    draw = torch.Generator().manual_seed(7)
    num, den, top = torch.randn(3, B, C, generator=draw)
    if empty:
        num, den, top = torch.zeros(B, C), torch.zeros(B, C), torch.full((B, C), -1e38)
    return torch.stack((num, den if empty else den.exp(), top), 2)


def _calls(module: Any, suffix: str, x: dict[str, Tensor], state: Tensor | None = None) -> dict[str, Tensor]:
    """Everything that the kernel's functions write, into tensors as transformers makes them."""
    w, u, k, v = x["w"], x["u"], x["k"], x["v"]
    y = torch.empty_like(k)
    written = {"y": y}
    if state is None:
        getattr(module, f"forward{suffix}")(w, u, k, v, y)
        gradients = {"gw": torch.empty_like(w, dtype=k.dtype), "gu": torch.empty_like(u)}
        gradients |= {"gk": torch.empty_like(k), "gv": torch.empty_like(v)}
        getattr(module, f"backward{suffix}")(w, u, k, v, y, x["gy"], *gradients.values())
        written |= gradients
    else:
        s = state.clone()
        getattr(module, f"forward_with_state{suffix}")(w, u, k, v, y, s)
        written |= {"mean": s[..., 0] / s[..., 1], "log_den": s[..., 1].log() + s[..., 2]}
    return written


def assert_computes(module: ModuleType, suffix: str, B: int, of: str) -> None:
    dtype = DTYPES[suffix]
    x = _inputs(B, dtype)
    state = None if of == "gradients" else _state(B, of == "empty_state")
    exact = _exact(x, state)
    for name, found in _calls(module, suffix, x, state).items():
        output = torch.float32 if name in ("mean", "log_den") else dtype
        assert_tensor_close(name, found, exact[name], _allowed(output))


OF = ["gradients", "empty_state", "state"]


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("B", [1, 2, 3])
@pytest.mark.parametrize("suffix", DTYPES)
def test_what_is_written_is_exact(suffix: str, B: int, of: str, native_backend: str) -> None:
    with rwkv_kernels.use_backend(native_backend), torch.device(torch.get_default_device()):
        assert_computes(hub, suffix, B, of)
