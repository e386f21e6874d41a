"""The numbers of Vision-RWKV's published kernel beside the paper's formula, by T and decay, in float64."""

import math

import torch
from torch import Tensor

from benchmarks.device import Device
from benchmarks.records import Record, Row
from rwkv_kernels import bi_wkv
from rwkv_kernels.compat.vision_rwkv import EPSILON, THREADS, published

TITLE = "Vision-RWKV's published kernel beside the paper's formula, errors relative to the largest element"

LENGTHS = [32, 196, 1024, 4096]
# Of every channel; a new model's are -5 to 3, over T.
DECAYS: list[float | None] = [None, -0.02, 0.02, 0.2, 0.5]
CHANNELS = 4
AGREEMENT = 1e-6  # of `published` with the sums that are written out here


def run(device: Device, record: Record) -> None:
    """A row for every length and decay: what the other distances and the residue change, each and together."""
    rows: list[Row] = []
    for T in LENGTHS[:2] if device.smoke else LENGTHS:
        for decay in DECAYS:
            rows.append({"T": T, "w": "a new model's" if decay is None else decay, **_differences(T, decay)})
            record.add(TITLE, ["T", "w"], rows)


def _differences(T: int, decay: float | None) -> Row:
    draw = torch.Generator().manual_seed(T)
    k, v, gy = torch.randn(3, 1, T, CHANNELS, generator=draw, dtype=torch.float64).unbind()
    w = torch.linspace(-5, 3, CHANNELS).double() / T if decay is None else torch.full((CHANNELS,), decay).double()
    u = torch.full_like(w, math.log(0.3) / T)
    exact, kernel = (_results(function, w, u, k, v, gy) for function in (_formula, published))
    written_out = [_written_out(w[c], u[c], k[0, :, c], v[0, :, c], gy[0, :, c]) for c in range(CHANNELS)]
    distances_alone, y, least, gk, gv = (torch.stack(x, -1) for x in zip(*written_out, strict=True))
    assert _error(kernel["y"][0], y) < AGREEMENT, "`published` is not the sums that it is compared by"
    return {
        "distances": _error(distances_alone, exact["y"][0]),
        "residue": _error(y, distances_alone),
        "y": _error(kernel["y"], exact["y"]),
        "least denominator": float(least.min()),
        "gradients": max(_error(kernel[name], exact[name]) for name in ("gw", "gu", "gk", "gv")),
        "gk, gv, of its own y": max(_error(kernel["gk"][0], gk), _error(kernel["gv"][0], gv)),
    }


def _formula(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return bi_wkv(-w, u, k, v, backend="cpu")


def _results(function: object, *inputs: Tensor) -> dict[str, Tensor]:
    *given, gy = inputs
    leaves = [x.clone().requires_grad_() for x in given]
    y = function(*leaves)  # type: ignore[operator]
    gradients = torch.autograd.grad(y, leaves, gy)
    return {"y": y.detach(), **dict(zip(("gw", "gu", "gk", "gv"), gradients, strict=True))}


def _written_out(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Of a channel, by its [T, T] weights.

    y with the kernel's distances alone, and with all; the denominators of the latter in units of the largest term; its
    gradients of k and v.
    """
    T = len(k)
    k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
    t = torch.arange(T)
    begin = (t - t % math.ceil(T / THREADS))[:, None]
    age = t[:, None] - t
    own_past, residual = (begin <= t) & (age > 0), (begin < t) & (age >= 0)
    logits = torch.where(age == 0, u + k, k - w * (age.abs() - own_past.double()))
    of_residue = torch.where(residual, k + w * age, -torch.inf)
    # The scale of 1e-6 is the largest term that was ever added or taken out.
    added = torch.where(begin <= t, k + w * age, -torch.inf)
    top = torch.stack((logits, added, of_residue + w)).amax((0, 2)).detach()[:, None]
    weights = (logits - top).exp()
    signed = weights + (of_residue - top).exp() * (1 - w.exp())
    denominators = signed.sum(1) + EPSILON
    y = signed @ v / denominators
    gk, gv = torch.autograd.grad(y, (k, v), gy)
    return (weights @ v / weights.sum(1)).detach(), y.detach(), denominators.detach(), gk, gv


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())
