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


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # The comparison is a part of every token's latency, and a tenth of what Tensor.to needs to find nothing to do.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _shift(x: Tensor, before: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Every token's predecessor, [B, T, C], and the last token, [B, C], which is the next call's `before`."""
    before = x.new_zeros(x.shape[0], x.shape[2]) if before is None else _in(x.dtype, before)
    tokens = torch.cat((before.unsqueeze(1), x), 1)
    if packing is None:
        # A copy, because a view would keep all tokens for as long as the model keeps the state.
        return tokens[:, :-1], tokens[:, -1].clone()
    return tokens[:, :-1], tokens[torch.arange(x.shape[0], device=x.device), packing.lengths]


def _is_eager_token(x: Tensor, packing: Packing | None) -> bool:
    """Whether x [B, T, C] is one token of each sequence, and no compiler or tracer's, which would specialise on T."""
    return isinstance(x, Tensor) and packing is None and not torch.compiler.is_compiling() and x.shape[1] == 1


def _mix(x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
    return torch.lerp(previous, x, _in(x.dtype, mix).view(-1))


def _of_the_sums(state: Tensor, x: Tensor) -> Tensor:
    """A WKV state of any model in the dtype that the sums over x have."""
    if not isinstance(state, Tensor):  # a proxy of torch.fx, whose dtype nobody knows
        return state
    if state.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"state: expected a WKV state of torch.float32 or torch.float64, got {state.dtype}, too coarse for its "
            "sums. RWKVState.to(dtype) leaves it float32; FSDP's mixed precision casts what is passed to a module "
            "unless it is told cast_forward_inputs=False"
        )
    return _in(torch.float64 if x.dtype == torch.float64 else torch.float32, state)


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
        self,
        x: Tensor,
        shift: Tensor | None = None,
        state: Tensor | None = None,
        packing: Packing | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C], shift [B, C], state [B, 3, C] -> the output [B, T, C] and the new shift and state.

        None stands for an empty shift or state. With `in_place`, the state may be overwritten by the new one, as it is
        by an eager call of one token; such a call is not differentiable.
        """
        if state is not None:
            state = _of_the_sums(state, x)
        if _is_eager_token(x, packing) and in_place and shift is not None and state is not None:
            x = x.squeeze(1)  # torch.nn.Linear is faster without the dimension of time
            k, v, r = self._project(x, _in(x.dtype, shift))
            gated = wkv_step(self.time_decay, self.time_first, k, v, state, r=r)
            return self.output(gated).unsqueeze(1), x, state
        previous, shift = _shift(x, shift, packing)
        k, v, r = self._project(x, previous)
        if packing is None:
            y, state = wkv(self.time_decay, self.time_first, k, v, state, return_state=True)
        else:
            y, state = wkv_of_packed(self.time_decay, self.time_first, k, v, state, packing)
        return self.output(torch.sigmoid(r) * y), shift, state


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

    def forward(self, x: Tensor, shift: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, C], shift [B, C] or None for an empty one -> the output [B, T, C] and the new shift."""
        if shift is not None and _is_eager_token(x, packing):
            x = x.squeeze(1)
            return self._network(x, _in(x.dtype, shift)).unsqueeze(1), x
        previous, shift = _shift(x, shift, packing)
        return self._network(x, previous), shift


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

    def forward(
        self, x: Tensor, state: RWKVState | None = None, packing: Packing | None = None, in_place: bool = False
    ) -> tuple[Tensor, RWKVState]:
        """x [B, T, C] and the block's state, None for an empty one -> the same of the next layer, and the new state.

        With a packing, x has the packed rows, and shifts and state are those at each row's own end. `in_place` is that
        of `TimeMix`.
        """
        att_shift, ffn_shift, wkv_state = (None, None, None) if state is None else state
        x = self.ln0(x)
        y, att_shift, wkv_state = self.att(self.ln1(x), att_shift, wkv_state, packing, in_place)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), ffn_shift, packing)
        return x + y, RWKVState(att_shift, ffn_shift, wkv_state)
