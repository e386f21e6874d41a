"""Sequences of different length in one batch, each as if it ran alone.

A step that does not count cannot be written as a key: it would age the state. So the sequences are sorted by length
and moved to the front of their rows, whatever side was padded. Between one end of a sequence and the next, the operator
runs over those rows only that go on, from the states where its last call left them. That is exact, and the operator
computes no step of padding.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import empty_state, wkv


class Packing(NamedTuple):
    """Where the steps of a padded batch [B, T] are in the packed one [B, S], S the greatest length.

    Attributes:
        mask: [B, T], bool, the steps that count.
        rows: [B], the sequence in each packed row, the longest first.
        steps: [B, S], the step of that sequence in each packed place; after its end, any other.
        lengths: [B], of the packed rows.
        segments: (rows, start, stop) in order of time: the first `rows` packed rows go on from start to stop.
    """

    mask: Tensor
    rows: Tensor
    steps: Tensor
    lengths: Tensor
    segments: list[tuple[int, int, int]]

    @staticmethod
    def of(mask: Tensor) -> "Packing":
        """Reads the lengths on the host, which waits for a GPU."""
        lengths, rows = mask.sum(1).sort(descending=True, stable=True)
        on_host: list[int] = lengths.tolist()
        ends = sorted({0, *on_host})
        segments = [(sum(length >= stop for length in on_host), start, stop) for start, stop in pairwise(ends)]
        # At least one place where there is a step, so that `unpack` always has something to point at.
        places = min(max(ends[-1], 1), mask.shape[1])
        steps = (~mask[rows]).to(torch.int8).argsort(dim=1, stable=True)[:, :places]
        return Packing(mask, rows, steps, lengths, segments)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T] -> [B, S], or [B, T, C] -> [B, S, C]. Padding becomes 0, so that it may be any number before."""
        mask, steps = (self.mask, self.steps) if x.dim() == 2 else (self.mask.unsqueeze(2), self.steps.unsqueeze(2))
        return x.masked_fill(~mask, 0)[self.rows].gather(1, steps.expand(-1, -1, *x.shape[2:]))

    def unpack(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, T, C], zero in the padding."""
        places = (self.mask.cumsum(1) - 1).clamp(min=0).unsqueeze(2).expand(-1, -1, x.shape[2])
        return x[self.rows.argsort()].gather(1, places).masked_fill(~self.mask.unsqueeze(2), 0)

    def last(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, 1, C], the last step of each sequence, zero for one without steps."""
        rows = self.rows.argsort()
        lengths = self.lengths[rows]
        return x[rows, (lengths - 1).clamp(min=0)].masked_fill((lengths == 0).unsqueeze(1), 0).unsqueeze(1)


def wkv_of_packed(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, packing: Packing
) -> tuple[Tensor, Tensor]:
    """`wkv` of packed k and v [B, S, C]: zeros after each row's end, and the states [B, 3, C] at each row's own end."""
    B, S, C = k.shape
    if state is None:
        state = empty_state(B, C, device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))
    outputs, states, done = [], [], 0
    for rows, start, stop in packing.segments:
        states.append(state[rows:])
        y, state = wkv(w, u, k[:rows, start:stop], v[:rows, start:stop], state[:rows], return_state=True)
        outputs.append(F.pad(y, (0, 0, 0, 0, 0, B - rows)))
        done = stop
    outputs.append(k.new_zeros(B, S - done, C))
    return torch.cat(outputs, 1), torch.cat([state, *reversed(states)])
