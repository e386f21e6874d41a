"""RWKV-4, the model of the paper, in torch on top of `rwkv_kernels.wkv`.

Every layer mixes over time and then over channels. Both see a token and its predecessor (the token shift), and both are
gated by a receptance r:

    time mixing     out = W_o (sigmoid(r) * wkv(k, v))           r, k, v = W (mix * x_t + (1 - mix) * x_{t-1})
    channel mixing  out = sigmoid(r) * (W_v max(k, 0)^2)         r, k likewise

All that a layer remembers is the last input of each mixing and the WKV state, so the same weights run over a whole
sequence or token by token. Names, shapes and initial values of the parameters are those of the published RWKV-4
checkpoints.

Source: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048), section 3 and, for the initial values, the
appendix on parameter initialisation.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from rwkv_kernels.functional import empty_state, wkv, wkv_step

__all__ = ["RWKV", "Block", "ChannelMix", "RWKVState", "TimeMix"]


class RWKVState(NamedTuple):
    """What the model remembers between two calls; for a single block, without the leading L.

    Attributes:
        att_shift, ffn_shift: [L, B, C], the last input of every time mixing and channel mixing.
        wkv: [L, B, 3, C], float32, or float64 for a float64 model: the states of `rwkv_kernels.wkv`.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor


def _shift(x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Every token's predecessor, [B, T, C], and the last token, [B, C], which is the next call's `before`."""
    tokens = torch.cat((before.unsqueeze(1), x), 1)
    return tokens[:, :-1], tokens[:, -1]


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
        return k, v, torch.sigmoid(self.receptance(_mix(x, previous, self.time_mix_r)))

    def forward(self, x: Tensor, shift: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C], shift [B, C], state [B, 3, C] -> the output [B, T, C] and the new shift and state."""
        previous, shift = _shift(x, shift)
        k, v, gate = self._project(x, previous)
        y, state = wkv(self.time_decay, self.time_first, k, v, state, return_state=True)
        return self.output(gate * y), shift, state

    def step(self, x: Tensor, shift: Tensor, state: Tensor) -> Tensor:
        """One token, x [B, C] -> [B, C]; shift and state move on in place."""
        k, v, gate = self._project(x, shift)
        y: Tensor = self.output(gate * wkv_step(self.time_decay, self.time_first, k, v, state))
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
        k = torch.relu(self.key(_mix(x, previous, self.time_mix_k))).square()
        gate = torch.sigmoid(self.receptance(_mix(x, previous, self.time_mix_r)))
        out: Tensor = gate * self.value(k)
        return out

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, C], shift [B, C] -> the output [B, T, C] and the new shift."""
        previous, shift = _shift(x, shift)
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

    def forward(self, x: Tensor, state: RWKVState) -> tuple[Tensor, RWKVState]:
        """x [B, T, C] and the block's state -> the same of the next layer, and the new state."""
        x = self.ln0(x)
        y, att_shift, wkv_state = self.att(self.ln1(x), state.att_shift, state.wkv)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift)
        return x + y, RWKVState(att_shift, ffn_shift, wkv_state)

    def step(self, x: Tensor, state: RWKVState) -> Tensor:
        """One token, x [B, C] -> [B, C]; the state moves on in place."""
        x = self.ln0(x)
        x = x + self.att.step(self.ln1(x), state.att_shift, state.wkv)
        return x + self.ffn.step(self.ln2(x), state.ffn_shift)


class RWKV(nn.Module):
    """The RWKV-4 language model.

    `load_state_dict` takes a published RWKV-4 checkpoint as it is; `from_state_dict` also reads the sizes off it.
    The backend is chosen by `rwkv_kernels.use_backend`.

    Args:
        vocab_size: V, how many tokens there are.
        channels: C, the width of the residual stream.
        layers: L.
        hidden: F, the inner width of the channel mixing; None for 4 C.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, vocab_size: int, channels: int, layers: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * channels if hidden is None else hidden
        if min(vocab_size, channels, layers, hidden) < 1:
            raise ValueError(f"sizes: expected positive numbers, got {vocab_size=}, {channels=}, {layers=}, {hidden=}")
        self.emb = nn.Embedding(vocab_size, channels)
        self.blocks = nn.ModuleList(Block(channels, hidden, layer, layers) for layer in range(layers))
        self.ln_out = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, vocab_size / channels) ** 0.5)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "RWKV":
        """A model of the state dict's sizes, dtypes and devices, holding copies of its tensors.

        Raises:
            ValueError: keys are missing or unknown, or shapes do not fit; the message names all of them.
        """
        shapes = {name: list(tensor.shape) for name, tensor in state_dict.items()}
        for name in ("emb.weight", "blocks.0.ffn.key.weight"):
            if len(shapes.get(name, ())) != 2:
                raise ValueError(f"state dict: expected a matrix {name!r}, got {shapes.get(name, 'none')}")
        (vocab_size, channels), hidden = shapes["emb.weight"], shapes["blocks.0.ffn.key.weight"][0]
        layers = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
        # The meta device has shapes without values, so nothing is allocated or initialised only to be replaced.
        with torch.device("meta"):
            model = cls(vocab_size, channels, layers, hidden)
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        faults = [f"missing {name}" for name in expected if name not in shapes]
        faults += [f"unknown {name}" for name in shapes if name not in expected]
        faults += [
            f"{name}: expected shape {shape}, got {shapes[name]}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ]
        if faults:
            raise ValueError(f"state dict does not fit an RWKV-4 model of {layers} layers: {'; '.join(faults)}")
        model.load_state_dict({name: tensor.detach().clone() for name, tensor in state_dict.items()}, assign=True)
        return model

    def empty_state(self, batch: int) -> RWKVState:
        """The state before the first token, for `batch` sequences."""
        weight, layers, channels = self.emb.weight, len(self.blocks), self.emb.embedding_dim
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        empty = empty_state(layers * batch, channels, device=weight.device, dtype=dtype)
        return RWKVState(
            weight.new_zeros(layers, batch, channels),
            weight.new_zeros(layers, batch, channels),
            empty.view(layers, batch, 3, channels),
        )

    def _layer_states(self, tokens: Tensor, state: RWKVState) -> list[RWKVState]:
        L, B, C = len(self.blocks), tokens.shape[0], self.emb.embedding_dim
        for name, tensor, shape in zip(state._fields, state, ((L, B, C), (L, B, C), (L, B, 3, C)), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"state.{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        return [RWKVState(*layer) for layer in zip(*(tensor.unbind() for tensor in state), strict=True)]

    def _features(self, tokens: Tensor, state: RWKVState | None) -> tuple[Tensor, RWKVState]:
        _check_tokens(tokens, ("B", "T"))
        states = self._layer_states(tokens, self.empty_state(tokens.shape[0]) if state is None else state)
        x = self.emb(tokens)
        for layer, block in enumerate(self.blocks):
            x, states[layer] = block(x, states[layer])
        return self.ln_out(x), RWKVState(*(torch.stack(tensors) for tensors in zip(*states, strict=True)))

    def forward(self, tokens: Tensor, state: RWKVState | None = None) -> tuple[Tensor, RWKVState]:
        """The logits of every next token.

        Args:
            tokens: [B, T], int64.
            state: As an earlier call returned it, or None for an empty one. It is not modified.

        Returns:
            logits [B, T, V], and the state after the last token, which continues the sequences as if they had never
            been cut. Both are differentiable, also through the state.

        Raises:
            ValueError: tokens or state have the wrong shape, or tokens are not int64.
        """
        x, state = self._features(tokens, state)
        return self.head(x), state

    def step(self, tokens: Tensor, state: RWKVState) -> Tensor:
        """One token of each sequence, for decoding: the state moves on in place.

        Args:
            tokens: [B], int64.
            state: Overwritten by the state after the token.

        Returns:
            logits [B, V].

        Not differentiable: call it under torch.no_grad().

        Raises:
            ValueError: as for `forward`, also if a gradient would be required.
        """
        _check_tokens(tokens, ("B",))
        x = self.emb(tokens)
        for block, layer_state in zip(self.blocks, self._layer_states(tokens, state), strict=True):
            x = cast(Block, block).step(x, layer_state)
        logits: Tensor = self.head(self.ln_out(x))
        return logits

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues the sequences: the prompt in parallel, then token by token, in memory that does not grow.

        Args:
            tokens: [B, T], int64, T >= 1: the prompts.
            max_new_tokens: How many tokens to append.
            temperature: Divides the logits; 0 takes the likeliest token every time.
            top_p: Samples among the likeliest tokens that together have at least this probability.
            generator: The source of randomness; None for torch's global one.

        Returns:
            [B, T + max_new_tokens], the prompts and their continuations.

        Raises:
            ValueError: an empty prompt, tokens of the wrong shape or dtype, max_new_tokens or temperature below 0, or
                top_p outside (0, 1].
        """
        _check_tokens(tokens, ("B", "T"))
        if tokens.shape[1] == 0:
            raise ValueError("tokens: expected a prompt of at least one token, got an empty one")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
        x, state = self._features(tokens, None)
        logits = self.head(x[:, -1])
        output = torch.cat((tokens, tokens.new_zeros(tokens.shape[0], max_new_tokens)), 1)
        for position in range(tokens.shape[1], output.shape[1]):
            output[:, position] = _sample(logits, temperature, top_p, generator)
            logits = self.step(output[:, position], state)
        return output


def _check_tokens(tokens: Tensor, shape: tuple[str, ...]) -> None:
    if tokens.dim() != len(shape):
        raise ValueError(f"tokens: expected shape [{', '.join(shape)}], got {list(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected torch.int64, got {tokens.dtype}")


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    likeliest, order = torch.softmax(logits.float() / temperature, -1).sort(descending=True)
    # A token stays while those before it fall short of top_p, so the likeliest one always does.
    kept = likeliest * (likeliest.cumsum(-1) - likeliest < top_p)
    return order.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)
