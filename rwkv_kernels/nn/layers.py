"""The layers of RWKV-4, on top of `rwkv_kernels.wkv`.

Every layer mixes over time and then over channels. Both see a token and its predecessor (the token shift), and both are
gated by a receptance r:

    time mixing     out = W_o (sigmoid(r) * wkv(k, v))           r, k, v = W (mix * x_t + (1 - mix) * x_{t-1})
    channel mixing  out = sigmoid(r) * (W_v max(k, 0)^2)         r, k likewise

Names, shapes and initial values of the parameters are those of the published RWKV-4 checkpoints.

Source: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048), section 3 and, for the initial values, the
appendix on parameter initialisation.
"""

import math

import torch
from torch import Tensor, nn

from rwkv_kernels.functional import wkv, wkv_step
from rwkv_kernels.nn.padding import Packing, wkv_of_packed
from rwkv_kernels.nn.state import RWKVState

__all__ = ["Block", "ChannelMix", "TimeMix"]


def _shift(x: Tensor, before: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Every token's predecessor, [B, T, C], and the last token, [B, C], which is the next call's `before`."""
    tokens = torch.cat((before.unsqueeze(1), x), 1)
    if packing is None:
        return tokens[:, :-1], tokens[:, -1]
    return tokens[:, :-1], tokens[torch.arange(x.shape[0], device=x.device), packing.lengths]


def _mix(x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
    return torch.lerp(previous, x, mix.view(-1))


def _ramp(channels: int, power: float) -> Tensor:
    return (torch.arange(channels) / channels).pow(power).view(1, 1, channels)


class TimeMix(nn.Module):
    """Time mixing, the layer's only path between tokens further apart than one (arXiv 2305.13048, equations 11 to 15).

    Args:
        channels: C.
        layer: This layer's index, from 0: deeper layers start with more long-lived channels.
        layers: How many layers the model has.
    """

    def __init__(self, channels: int, layer: int, layers: int) -> None:
        super().__init__()
        depth = layer / max(layers - 1, 1)
        ramp = 1 - layer / layers
        position = torch.arange(channels) / max(channels - 1, 1)
        zigzag = (torch.arange(channels) + 1) % 3 - 1
        self.time_decay = nn.Parameter(-5 + 8 * position ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag)
        self.time_mix_k = nn.Parameter(_ramp(channels, ramp))
        self.time_mix_v = nn.Parameter(_ramp(channels, ramp) + 0.3 * depth)
        self.time_mix_r = nn.Parameter(_ramp(channels, 0.5 * ramp))
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        nn.init.orthogonal_(self.value.weight)
        for linear in (self.key, self.receptance, self.output):
            nn.init.zeros_(linear.weight)

    def _project(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k = self.key(_mix(x, previous, self.time_mix_k))
        v = self.value(_mix(x, previous, self.time_mix_v))
        return k, v, self.receptance(_mix(x, previous, self.time_mix_r))

    def forward(
        self, x: Tensor, shift: Tensor, state: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C], shift [B, C], state [B, 3, C] -> the output [B, T, C] and the new shift and state."""
        previous, shift = _shift(x, shift, packing)
        k, v, r = self._project(x, previous)
        if packing is None:
            y, state = wkv(self.time_decay, self.time_first, k, v, state, return_state=True)
        else:
            y, state = wkv_of_packed(self.time_decay, self.time_first, k, v, state, packing)
        return self.output(torch.sigmoid(r) * y), shift, state

    def step(self, x: Tensor, shift: Tensor, state: Tensor) -> Tensor:
        """One token, x [B, C] -> [B, C]; shift and state move on in place."""
        k, v, r = self._project(x, shift)
        y: Tensor = self.output(wkv_step(self.time_decay, self.time_first, k, v, state, r=r))
        shift.copy_(x)
        return y


class ChannelMix(nn.Module):
    """Channel mixing, a gated two-layer network of squared ReLUs (arXiv 2305.13048, equations 16 to 18).

    Args:
        channels: C.
        hidden: F, the width of the inner layer.
        layer: This layer's index, from 0.
        layers: How many layers the model has.
    """

    def __init__(self, channels: int, hidden: int, layer: int, layers: int) -> None:
        super().__init__()
        ramp = 1 - layer / layers
        self.time_mix_k = nn.Parameter(_ramp(channels, ramp))
        self.time_mix_r = nn.Parameter(_ramp(channels, ramp))
        self.key = nn.Linear(channels, hidden, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(hidden, channels, bias=False)
        nn.init.orthogonal_(self.key.weight, gain=max(1.0, hidden / channels) ** 0.5)
        for linear in (self.receptance, self.value):
            nn.init.zeros_(linear.weight)

    def _network(self, x: Tensor, previous: Tensor) -> Tensor:
        k = torch.relu(self.key(_mix(x, previous, self.time_mix_k)))
        k = k * k  # square() is a power to autocast on GPUs, which takes it in float32
        gate = torch.sigmoid(self.receptance(_mix(x, previous, self.time_mix_r)))
        out: Tensor = gate * self.value(k)
        return out

    def forward(self, x: Tensor, shift: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, C], shift [B, C] -> the output [B, T, C] and the new shift."""
        previous, shift = _shift(x, shift, packing)
        return self._network(x, previous), shift

    def step(self, x: Tensor, shift: Tensor) -> Tensor:
        """One token, x [B, C] -> [B, C]; shift moves on in place."""
        y = self._network(x, shift)
        shift.copy_(x)
        return y


class Block(nn.Module):
    """A layer: time mixing, then channel mixing, both on a layer norm of the residual stream and added to it.

    Args:
        channels: C.
        hidden: F, the inner width of the channel mixing.
        layer: This layer's index, from 0; layer 0 also normalises the embeddings (`ln0`).
        layers: How many layers the model has.
    """

    def __init__(self, channels: int, hidden: int, layer: int, layers: int) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(channels) if layer == 0 else nn.Identity()
        self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.att = TimeMix(channels, layer, layers)
        self.ffn = ChannelMix(channels, hidden, layer, layers)

    def forward(self, x: Tensor, state: RWKVState, packing: Packing | None = None) -> tuple[Tensor, RWKVState]:
        """x [B, T, C] and the block's state -> the same of the next layer, and the new state.

        With a packing, x has the packed rows, and shifts and state are those at each row's own end.
        """
        x = self.ln0(x)
        y, att_shift, wkv_state = self.att(self.ln1(x), state.att_shift, state.wkv, packing)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, packing)
        return x + y, RWKVState(att_shift, ffn_shift, wkv_state)

    def step(self, x: Tensor, state: RWKVState) -> Tensor:
        """One token, x [B, C] -> [B, C]; the state moves on in place."""
        x = self.ln0(x)
        x = x + self.att.step(self.ln1(x), state.att_shift, state.wkv)
        return x + self.ffn.step(self.ln2(x), state.ffn_shift)
