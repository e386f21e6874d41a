"""transformers' RWKV layers over packed sequences, for `rwkv_kernels.compat.transformers`.

The originals shift tokens by padding and know no boundaries, so the two layers that mix over time are computed here,
by their own modules and parameters, where the state that they are given has boundaries with it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import wkv
from ..nn import Packing

__all__ = ["PackedState", "attention", "feed_forward"]


class PackedState(list[Any]):
    """The five parts of a model's state [N, C, L] while its layers run, and the boundaries.

    A layer is given them by the argument that every version passes on, also when it runs again for checkpointing.
    """

    def __init__(self, parts: Sequence[Any], packing: Packing) -> None:
        super().__init__(parts)
        self.packing = packing


def _shift(hidden: Tensor, state: PackedState, part: int, layer: int) -> Tensor:
    """Each token's predecessor; the last tokens go into the state."""
    previous, last = state.packing.shift(hidden, state[part][:, :, layer].to(hidden.dtype))
    state[part][:, :, layer] = last
    return previous


def _mix(hidden: Tensor, shifted: Tensor, mix: Tensor) -> Tensor:
    return hidden * mix + shifted * (1 - mix)


def attention(forward: Callable[..., Any]) -> Callable[..., Any]:
    """RwkvSelfAttention.forward, also for a PackedState."""

    @functools.wraps(forward)
    def replacement(self: Any, hidden: Tensor, state: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state, PackedState):
            return forward(self, hidden, state, *args, **kwargs)
        layer, sums = self.layer_id, state[2:]
        shifted = _shift(hidden, state, 1, layer)
        k = self.key(_mix(hidden, shifted, self.time_mix_key))
        v = self.value(_mix(hidden, shifted, self.time_mix_value))
        r = self.receptance(_mix(hidden, shifted, self.time_mix_receptance))
        given = torch.stack([part[:, :, layer] for part in sums], 1).to(torch.promote_types(k.dtype, torch.float32))
        gated, new = wkv(
            self.time_decay,
            self.time_first,
            k,
            v,
            given,
            r=r,
            cu_seqlens=state.packing.cu_seqlens,
            return_state=True,
        )
        for part, column in zip(sums, new.unbind(1), strict=True):
            part[:, :, layer] = column
        return self.output(gated), state

    return replacement


def feed_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """RwkvFeedForward.forward, also for a PackedState."""

    @functools.wraps(forward)
    def replacement(self: Any, hidden: Tensor, state: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state, PackedState):
            return forward(self, hidden, state, *args, **kwargs)
        shifted = _shift(hidden, state, 0, self.layer_id)
        k = torch.relu(self.key(_mix(hidden, shifted, self.time_mix_key))).square()
        gate = torch.sigmoid(self.receptance(_mix(hidden, shifted, self.time_mix_receptance)))
        return gate * self.value(k), state

    return replacement
