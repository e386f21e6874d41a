"""The action of a slice of steps on a state and on an adjoint, and the arithmetic that joins slices.

A slice maps the state before it to e^(steps · log_decay) times it plus a summary, the state that its steps leave
behind an empty one; and the adjoint after it to the same multiple plus a summary of its own. docs/distributed.md
derives it. States are (num, den, max), adjoints are those of (num, den), relative to a state's max.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..reference import EMPTY_MAX, state_dtype

__all__ = ["adjoint_weights", "join", "log_decay_of", "normal", "running_maxima"]


def log_decay_of(w: Tensor, dtype: torch.dtype) -> Tensor:
    """-exp(w) in the dtype of the sums of a k of `dtype`; finite, because it is multiplied by no steps, too."""
    return -torch.exp(w.to(state_dtype(dtype)).clamp(max=64))


def normal(state: Tensor) -> Tensor:
    """The state [B, 3, C], (0, 0, -1e38) where it is empty."""
    num, den, top = state.unbind(1)
    empty = den == 0
    return torch.stack((num.masked_fill(empty, 0), den, top.masked_fill(empty, EMPTY_MAX)), 1)


def _column(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def running_maxima(states: Tensor, steps: Sequence[int], log_decay: Tensor) -> Tensor:
    """The max [n, B, C] of the state after each of n slices, whose summaries are `states` [n, B, 3, C].

    In log2(n) rounds, each of which doubles the slices that a row covers.
    """
    maxima = states[:, :, 2]
    ends = list(accumulate(steps))
    distance = 1
    while distance < len(steps):
        between = [end - start for start, end in zip(ends, ends[distance:], strict=False)]
        earlier = maxima[:-distance] + _column(between, maxima) * log_decay
        maxima = torch.cat((maxima[:distance], torch.maximum(maxima[distance:], earlier)))
        distance *= 2
    return maxima


def join(states: Tensor, steps: Sequence[int], log_decay: Tensor, top: Tensor) -> Tensor:
    """The state [B, 3, C] after n slices, whose max is `top` [B, C]."""
    *_, total = ends = list(accumulate(steps))
    age = _column([total - end for end in ends], top)
    weights = torch.exp(states[:, :, 2] + age * log_decay - top)
    sums = (weights.unsqueeze(2) * states[:, :, :2]).sum(0)
    return torch.cat((sums, top.unsqueeze(1)), 1)


def adjoint_weights(maxima: Tensor, steps: Sequence[int], rank: int, log_decay: Tensor) -> Tensor:
    """The share [n - rank, B, C] of later adjoints in the one after this rank's slice.

    The first is of the adjoint before the next rank's slice, and so on; the last is of that after all slices.
    """
    later = [0, *accumulate(steps[rank + 1 :])]
    return torch.exp(_column(later, maxima) * log_decay + maxima[rank] - maxima[rank:])
