"""Errors against the float64 oracle, beside those of the step loop in the same dtype."""

import torch
from torch import Tensor

import rwkv_kernels
from benchmarks.device import Device, backends
from benchmarks.problem import name_of
from benchmarks.records import Record, Row

TITLE = "Accuracy: worst error against the float64 oracle, relative to the largest element; in brackets the step loop's"

LENGTHS = [1, 37, 1024, 65536]
B, CHANNELS = 2, 128
CHANNELS_OF_THE_LONGEST = 16  # whose step loops keep millions of tensors for autograd
LONGEST_OF_THE_LOOP = 1024  # the oracle alone takes minutes for the longest
NAMES = ["y", "state", "gw", "gu", "gk", "gv", "gstate"]


def run(device: Device, record: Record) -> None:
    """A row for every dtype, length and backend; the columns are outputs and gradients."""
    rows: list[Row] = []
    for T in LENGTHS[:2] if device.smoke else LENGTHS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            inputs = _inputs(T, dtype)
            exact = _results(tuple(x.double() for x in inputs), "reference")
            loop = _results(inputs, "reference") if T <= LONGEST_OF_THE_LOOP else None
            for backend in backends(device):
                ours = _results(tuple(x.to(device.type) for x in inputs), backend)
                row: Row = {"T": T, "dtype": name_of(dtype), "backend": backend}
                for name in NAMES:
                    row[name] = f"{_error(ours[name], exact[name]):.1e}"
                    if loop is not None:
                        row[name] += f" ({_error(loop[name], exact[name]):.1e})"
                rows.append(row)
            record.add(TITLE, ["T", "dtype", "backend"], rows)


def _inputs(T: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    C = CHANNELS_OF_THE_LONGEST if LENGTHS[-1] == T else CHANNELS
    draw = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    # Decays from e^-0.0001 to e^-8 per step: those of a trained model and beyond.
    w = torch.linspace(-9, 2, C)
    state = torch.stack((normal(B, C), normal(B, C).exp(), normal(B, C)), 1)
    return w, normal(C), normal(B, T, C).to(dtype), normal(B, T, C).to(dtype), state, normal(B, T, C).to(dtype)


def _results(inputs: tuple[Tensor, ...], backend: str) -> dict[str, Tensor]:
    *given, gy = inputs
    leaves = [x.requires_grad_() for x in (y.detach().clone() for y in given)]
    y, state = rwkv_kernels.wkv(*leaves, return_state=True, backend=backend)
    num, den, _ = state.unbind(1)
    # A function of y and of the state's mean, which is independent of the gauge.
    loss = (y * gy).sum() + (num / den).sum()
    gw, gu, gk, gv, gstate = torch.autograd.grad(loss, leaves)
    results = {"y": y, "state": num / den, "gw": gw, "gu": gu, "gk": gk, "gv": gv, "gstate": gstate}
    return {name: x.detach().double().cpu() for name, x in results.items()}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
