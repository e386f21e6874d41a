"""A backend "toy" in one file, imported or as a plugin of pytest (-p toy_backend): a forward in torch's operators.

It keeps the mean and the logarithm of the denominator, in float64, where the others keep (num, den, max).
"""

import torch
from torch import Tensor

import rwkv_kernels
from rwkv_kernels._backends.registry import Backend, register

LEAST = -1e300  # finite, because a difference of infinities is NaN


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, r: Tensor | None, cu_seqlens: None
) -> tuple[Tensor, Tensor]:
    decay, bonus = w.double().exp(), u.double()
    if state is None:
        state = rwkv_kernels.empty_state(k.shape[0], k.shape[2])
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
        packs=False,
        why_not=lambda k: None if k.shape[1] else "k has no steps",
    )
)
