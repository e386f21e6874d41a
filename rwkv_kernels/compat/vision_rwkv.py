"""Vision-RWKV's `RUN_CUDA`, and what its published kernel computes.

    from rwkv_kernels.compat.vision_rwkv import RUN_CUDA

instead of the definitions of `WKV` and `RUN_CUDA` and the compilation above them, in Vision-RWKV's
`models/backbones/vrwkv.py` or in a copy of it. Its decay is positive where weights fall with distance
(`log_decay = -w`), and so is the gradient of it; callers pass `spatial_decay / T` and `spatial_first / T`.

Deliberate differences:

- `RUN_CUDA` computes the formula of the paper (arXiv 2403.02308). The published kernel computes something else, which
  depends on how it cuts T: `published` has its numbers, so that a user of a checkpoint that was trained with the kernel
  can measure what the switch changes.
- T is not limited, B·C need not be a multiple of 32, and nothing is compiled at import.
- Tensors stay on their device, where the original moves them to the current GPU; the CPU works.
- y is rounded to k's dtype before it takes w's, as no float32 copies are made; float64 stays float64.
- Results are the same in every run, where the newer kernel sums gradients by atomic additions.
"""

from typing import NamedTuple, cast, overload

import torch
from torch import Tensor

from ..functional import bi_wkv

__all__ = ["RUN_CUDA", "published"]

THREADS = 32  # which the published kernel cuts a sequence for
EPSILON = 1e-6  # in its denominators, beside a largest weight of 1
SMALLEST = -1e38  # the logit of no weight


@overload
def RUN_CUDA(w: Tensor, u: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...
@overload
def RUN_CUDA(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...
def RUN_CUDA(*arguments: int | Tensor) -> Tensor:
    """The bidirectional operator: `RUN_CUDA(w, u, k, v)`, or the older `RUN_CUDA(B, T, C, w, u, k, v)`.

    Args:
        B, T, C: The shape of k.
        w, u: [C], any floating dtype, the decay (`log_decay = -w`, of either sign) and the bonus.
        k, v: [B, T, C], of one dtype.

    Returns:
        y [B, T, C], in w's dtype.

    Differentiable in w, u, k and v.

    Raises:
        TypeError: Neither four nor seven arguments, or w, u, k or v is no tensor.
        ValueError: k has another shape than B, T, C. Otherwise as `rwkv_kernels.bi_wkv`.
    """
    if len(arguments) not in (4, 7):
        raise TypeError(f"RUN_CUDA: expected (w, u, k, v) or (B, T, C, w, u, k, v), got {len(arguments)} arguments")
    *shape, w, u, k, v = arguments
    for name, x in (("w", w), ("u", u), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    w, u, k, v = cast(tuple[Tensor, ...], (w, u, k, v))
    if shape and list(k.shape) != shape:
        raise ValueError(f"k: expected shape [B, T, C] = {shape}, got {list(k.shape)}")
    return bi_wkv(-w, u, k, v).to(w.dtype)


class _Sums(NamedTuple):
    """Sums of weights with values (num) and without (den), both to be multiplied by e^top; [B, C] or [B, T, C]."""

    num: Tensor
    den: Tensor
    top: Tensor

    def decayed(self, logit: Tensor) -> "_Sums":
        return self._replace(top=self.top - logit)

    def plus(self, weight: float, value: Tensor, logit: Tensor) -> "_Sums":
        """With a weight·e^logit more, which is of the value."""
        top = torch.maximum(self.top, logit).detach()
        own, more = torch.exp(self.top - top), weight * torch.exp(logit - top)
        return _Sums(own * self.num + more * value, own * self.den + more, top)


def published(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numbers of Vision-RWKV's published kernel, its gradients included, in plain torch: slow, to compare with.

    The kernel cuts a sequence into 32 parts of n = ceil(T/32) steps. For step t, of the part that begins at step b, a
    weight is

        e^{k_s - (t-1-s)w}                        for s from b to t - 1, as in the paper's formula,
        e^{k_s - (t-s)w}                          for s < b, a step further than in the formula,
        e^{k_s - (s-t)w}                          for s > t, likewise,
        e^{k_s + (t-s)w}·(1 - e^w)                for s from b + 1 to t, in addition: a residue of taking the step out,

    and 1e-6 of the largest of the terms that it has added or taken out is added to the denominator. Its gradients of w
    and u are of this, with that last addition taken for a constant; those of k and v are of the formula, at the y and
    the denominators of this, and so of neither. For T ≤ 32 every part is a step, and all distances are |t-s|.

    Args:
        w, u: [C], any floating dtype, the decay (`log_decay = -w`) and the bonus, as for RUN_CUDA.
        k, v: [B, T, C], any floating dtype.

    Returns:
        y [B, T, C], in w's dtype. All sums are float32, or float64 for float64 inputs.
    """
    dtype = torch.promote_types(torch.promote_types(w.dtype, k.dtype), torch.float32)
    decay, bonus, keys, values = (x.to(dtype) for x in (w, u, k, v))
    if k.shape[1] == 0:
        return torch.zeros_like(k, dtype=w.dtype)
    y, reciprocal, top = _kernel_forward(decay, bonus, keys.detach(), values.detach())
    # Zero, with the kernel's gradients of k and v: those of num/den with the formula's sums and the kernel's results.
    num, den = _formula_sums(decay.detach(), bonus.detach(), keys, values, top)
    slope = (num - y.detach() * den) * reciprocal.detach()
    return (y + (slope - slope.detach())).to(w.dtype)


def _kernel_forward(w: Tensor, u: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and its denominators' reciprocals, of sums that are to be multiplied by e^top, and these top."""
    before, after = _before(w, keys, values), _after(w, keys, values)
    steps = -(-keys.shape[1] // THREADS)
    results = []
    for t, (kt, vt) in enumerate(zip(keys.unbind(1), values.unbind(1), strict=True)):
        if t % steps == 0:
            past, future = (_Sums(*(x[:, t] for x in sums)).decayed(w) for sums in (before, after))
            # The part's first step is taken out without a residue, but remains in the scale.
            future = future.plus(0.0, vt, kt)
        else:
            future = future.decayed(-w).plus(-1.0, vt, kt + w)
        top = torch.maximum(torch.maximum(past.top, future.top), u + kt).detach()
        of_past, of_future, present = (torch.exp(x - top) for x in (past.top, future.top, u + kt))
        reciprocal = 1 / (of_past * past.den + of_future * future.den + present + EPSILON)
        results.append(((of_past * past.num + of_future * future.num + present * vt) * reciprocal, reciprocal, top))
        past = past.decayed(w).plus(1.0, vt, kt)
    y, reciprocals, tops = (torch.stack(x, 1) for x in zip(*results, strict=True))
    return y, reciprocals, tops


def _formula_sums(w: Tensor, u: Tensor, keys: Tensor, values: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's numerator and denominator at every step, to be multiplied by e^top."""
    before, after = _before(w, keys, values), _after(w, keys, values)
    of_past, of_future, present = (torch.exp(x - top) for x in (before.top, after.top, u + keys))
    num = of_past * before.num + of_future * after.num + present * values
    return num, of_past * before.den + of_future * after.den + present


def _before(w: Tensor, keys: Tensor, values: Tensor) -> _Sums:
    """At every step t, over the steps s before it, of weights e^{k_s - (t-1-s)w}."""
    zero = torch.zeros_like(keys[:, 0])
    states = [_Sums(zero, zero, torch.full_like(zero, SMALLEST))]
    for kt, vt in zip(keys.unbind(1), values.unbind(1), strict=True):
        states.append(states[-1].decayed(w).plus(1.0, vt, kt))
    return _Sums(*(torch.stack(x, 1) for x in zip(*states[:-1], strict=True)))


def _after(w: Tensor, keys: Tensor, values: Tensor) -> _Sums:
    """Likewise over the steps after it."""
    return _Sums(*(x.flip(1) for x in _before(w, keys.flip(1), values.flip(1))))
