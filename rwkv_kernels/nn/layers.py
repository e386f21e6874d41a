"""The layers of RWKV-4, on top of `rwkv_kernels.wkv`.

Every layer mixes over time and then over channels. Both see a token and its predecessor (the token shift), and both are
gated by a receptance r:

    time mixing     out = W_o (sigmoid(r) * wkv(k, v))           r, k, v = W (mix * x_t + (1 - mix) * x_{t-1})
    channel mixing  out = sigmoid(r) * (W_v max(k, 0)^2)         r, k likewise

Names, shapes and initial values of the parameters are those of the published RWKV-4 checkpoints.

Source: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048), section 3 and, for the initial values, the
appendix on parameter initialisation.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..functional import wkv, wkv_step
from .packing import Packing
from .state import RWKVState

__all__ = ["Block", "ChannelMix", "TimeMix"]

Layer = TypeVar("Layer", nn.Linear, nn.Embedding)


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # The comparison is a part of every token's latency, and a tenth of what Tensor.to needs to find nothing to do.
    # By identity, which a proxy of torch.fx can be asked for.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _shift(x: Tensor, before: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Every token's predecessor, as x, and each sequence's last token, [B, C], which is the next call's `before`."""
    sequences = x.shape[0] if packing is None else packing.starts.shape[0]
    before = x.new_zeros(sequences, x.shape[2]) if before is None else _in(x.dtype, before)
    if packing is not None:
        return packing.shift(x, before)
    tokens = torch.cat((before.unsqueeze(1), x), 1)
    # A copy, because a view would keep all tokens for as long as the model keeps the state.
    return tokens[:, :-1], tokens[:, -1].clone()


def _is_eager_token(x: Tensor, packing: Packing | None) -> bool:
    """Whether x [B, T, C] is one token of each sequence, and nothing traces the call: it would specialise on T."""
    return packing is None and isinstance(x, Tensor) and not torch.compiler.is_compiling() and x.shape[1] == 1


def _mix(x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
    return torch.lerp(previous, x, _in(x.dtype, mix).view(-1))


def of_the_sums(state: Tensor, x: Tensor) -> Tensor:
    """A WKV state of any model in the dtype that the sums over x have."""
    if not isinstance(state, Tensor):
        return state  # a proxy of torch.fx, whose tensor the operator will check
    if state.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"state: expected a WKV state of torch.float32 or torch.float64, got {state.dtype}, too coarse for its "
            "sums. RWKVState.to(dtype) leaves it float32; FSDP's mixed precision casts what is passed to a module "
            "unless it is told cast_forward_inputs=False"
        )
    return _in(torch.float64 if x.dtype == torch.float64 else torch.float32, state)


# Every module resets the parameters that it owns itself and no others, as torch asks of `reset_parameters`: a
# model made on the meta device is then initialised by calling it on all modules, in any order. Initial values are
# computed in float32 at least: 16-bit types have no QR decomposition, and too few bits for a position among channels.


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _position(channels: int, like: Tensor) -> Tensor:
    """0, 1, ..., channels - 1."""
    return torch.arange(channels, dtype=_wide(like), device=like.device)


def _ramp(channels: int, power: float, like: Tensor) -> Tensor:
    return (_position(channels, like) / channels).pow(power).view(1, 1, channels)


def _orthogonal(weight: Tensor, gain: float) -> None:
    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=_wide(weight)), gain))


@torch.no_grad()
def _reset(layer: nn.Module, start: Callable[[Tensor], object]) -> None:
    start(cast(Tensor, layer.weight))


def _starting(kind: type[Layer], *sizes: int, start: Callable[[Tensor], object], **settings: bool) -> Layer:
    """A layer of torch's own type, by which other tools know it, whose `reset_parameters` sets other initial values."""
    layer = nn.utils.skip_init(kind, *sizes, **settings, device=torch.get_default_device())
    layer.reset_parameters = functools.partial(_reset, layer, start)
    layer.reset_parameters()
    return cast(Layer, layer)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias that starts as zero."""
    return _starting(nn.Linear, inputs, outputs, start=nn.init.zeros_, bias=False)


def orthogonal_linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer without bias that starts as `gain` times a random orthogonal matrix."""
    return _starting(nn.Linear, inputs, outputs, start=functools.partial(_orthogonal, gain=gain), bias=False)


def narrow_embedding(tokens: int, channels: int) -> nn.Embedding:
    """An embedding that starts close to zero."""
    return _starting(nn.Embedding, tokens, channels, start=functools.partial(nn.init.uniform_, a=-1e-4, b=1e-4))


class TimeMix(nn.Module):
    """Time mixing, the layer's only path between tokens further apart than one (arXiv 2305.13048, equations 11 to 15).

    Args:
        channels: C.
        layer: This layer's index, from 0: deeper layers start with more long-lived channels.
        layers: How many layers the model has.
    """

    def __init__(self, channels: int, layer: int, layers: int) -> None:
        super().__init__()
        self.layer, self.layers = layer, layers
        self.time_decay = nn.Parameter(torch.empty(channels))
        self.time_first = nn.Parameter(torch.empty(channels))
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, channels))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, channels))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, channels))
        self.key = zero_linear(channels, channels)
        self.value = orthogonal_linear(channels, channels)
        self.receptance = zero_linear(channels, channels)
        self.output = zero_linear(channels, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the initial values of the decay, the bonus and the mixes; the linear layers have their own."""
        channels, like = self.time_decay.shape[0], self.time_decay
        depth = self.layer / max(self.layers - 1, 1)
        ramp = 1 - self.layer / self.layers
        position = _position(channels, like)
        self.time_decay.copy_(-5 + 8 * (position / max(channels - 1, 1)) ** (0.7 + 1.3 * depth))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((position + 1) % 3 - 1))
        self.time_mix_k.copy_(_ramp(channels, ramp, like))
        self.time_mix_v.copy_(_ramp(channels, ramp, like) + 0.3 * depth)
        self.time_mix_r.copy_(_ramp(channels, 0.5 * ramp, like))

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

        None stands for an empty shift or state. With a packing of N sequences, x is [1, total, C], and shifts and
        states are [N, ...]. With `in_place`, the state may be overwritten by the new one, as it is by an eager call of
        one token; such a call is not differentiable.
        """
        if state is not None:
            state = of_the_sums(state, x)
        if _is_eager_token(x, packing) and in_place and shift is not None and state is not None:
            x = x.squeeze(1)  # torch.nn.Linear is faster without the dimension of time
            k, v, r = self._project(x, _in(x.dtype, shift))
            gated = wkv_step(self.time_decay, self.time_first, k, v, state, r=r)
            return self.output(gated).unsqueeze(1), x, state
        previous, shift = _shift(x, shift, packing)
        k, v, r = self._project(x, previous)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        gated, state = wkv(self.time_decay, self.time_first, k, v, state, r=r, cu_seqlens=cu_seqlens, return_state=True)
        return self.output(gated), shift, state


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
        self.layer, self.layers = layer, layers
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, channels))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, channels))
        self.key = orthogonal_linear(channels, hidden, gain=max(1.0, hidden / channels) ** 0.5)
        self.receptance = zero_linear(channels, channels)
        self.value = zero_linear(hidden, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the initial values of the mixes; the linear layers have their own."""
        for mix in (self.time_mix_k, self.time_mix_r):
            mix.copy_(_ramp(mix.shape[-1], 1 - self.layer / self.layers, mix))

    def _network(self, x: Tensor, previous: Tensor) -> Tensor:
        k = torch.relu(self.key(_mix(x, previous, self.time_mix_k)))
        k = k * k  # square() is a power to autocast on GPUs, which takes it in float32
        gate = torch.sigmoid(self.receptance(_mix(x, previous, self.time_mix_r)))
        out: Tensor = gate * self.value(k)
        return out

    def forward(self, x: Tensor, shift: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, C], shift [B, C] or None for an empty one -> the output [B, T, C] and the new shift.

        With a packing as in `TimeMix`.
        """
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

        `packing` and `in_place` are those of `TimeMix`.
        """
        att_shift, ffn_shift, wkv_state = (None, None, None) if state is None else state
        x = self.ln0(x)
        y, att_shift, wkv_state = self.att(self.ln1(x), att_shift, wkv_state, packing, in_place)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), ffn_shift, packing)
        return x + y, RWKVState(att_shift, ffn_shift, wkv_state)
