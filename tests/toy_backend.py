"""A backend "toy" in one file, imported or as a plugin of pytest (-p toy_backend): a forward in torch's operators.

It keeps the mean and the logarithm of the denominator, in float64, where the others keep (num, den, max).
"""

import torch
from torch import Tensor

import rwkv_kernels
from rwkv_kernels._backends.registry import Backend, register

LEAST = -1e300  # finite, because a difference of infinities is NaN


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, r: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if state is None:
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = rwkv_kernels.empty_state(sequences, k.shape[2])
    if cu_seqlens is None:
        return _sequences(w, u, k, v, state, r)
    steps = cu_seqlens.diff().tolist()
    gates = [None] * len(steps) if r is None else r.split(steps, 1)
    pieces = zip(k.split(steps, 1), v.split(steps, 1), state.split(1), gates, strict=True)
    ys, states = zip(*(_sequences(w, u, *piece) for piece in pieces), strict=True)
    return torch.cat(ys, 1), torch.cat(states)


def _sequences(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
    if not k.shape[1]:
        return v, state.to(torch.promote_types(k.dtype, torch.float32))
    decay, bonus = w.double().exp(), u.double()
    num, den, top = state.double().unbind(1)
    empty = den == 0
    den = torch.where(empty, 1, den)
    mean, log_den = torch.where(empty, 0, num / den), torch.where(empty, LEAST, top + den.log())
    outputs = []
    for kt, vt in zip(k.double().unbind(1), v.double().unbind(1), strict=True):
        outputs.append(mean + torch.sigmoid(bonus + kt - log_den) * (vt - mean))
        log_den = log_den - decay
        mean = mean + torch.sigmoid(kt - log_den) * (vt - mean)
        log_den = torch.logaddexp(log_den, kt)
    top = log_den.detach()  # a gauge, which no gradient passes
    den = torch.exp(log_den - top)
    after = torch.stack((mean * den, den, top), 1)
    y = torch.stack(outputs, 1)
    y = y if r is None else torch.sigmoid(r.double()) * y
    return y.to(k.dtype), after.to(torch.promote_types(k.dtype, torch.float32))


register(
    Backend(
        "toy",
        _forward,
        device_types=("cpu",),
        why_not=lambda k: None if k.shape[1] else "k has no steps",
    )
)
