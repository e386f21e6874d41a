"""RWKV-4 in float64, token after token, with the sums as the paper writes them and nothing of the package.

Keys must stay small: e^k is taken literally.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PlainState(NamedTuple):
    """Per layer: the last inputs of both mixings, [B, C], and the sums N and D, [B, C]."""

    att_shift: Tensor
    ffn_shift: Tensor
    N: Tensor
    D: Tensor


def empty(weights: Mapping[str, Tensor], batch: int) -> list[PlainState]:
    channels = weights["emb.weight"].shape[1]
    layers = len([name for name in weights if name.endswith("att.time_decay")])
    return [PlainState(*torch.zeros(4, batch, channels, dtype=torch.float64)) for _ in range(layers)]


def run(
    weights: Mapping[str, Tensor], tokens: Tensor, state: Sequence[PlainState] | None = None
) -> tuple[Tensor, list[PlainState]]:
    """Logits [B, T, V] and the states after, differentiable; weights by RWKV-LM's names, in float64."""
    states = list(empty(weights, tokens.shape[0]) if state is None else state)
    logits = []
    for token in tokens.unbind(1):
        x = normalised(weights, "blocks.0.ln0", weights["emb.weight"][token])
        for layer, before in enumerate(states):
            x, states[layer] = block(weights, f"blocks.{layer}.", x, before)
        logits.append(normalised(weights, "ln_out", x) @ weights["head.weight"].T)
    return torch.stack(logits, 1), states


def block(weights: Mapping[str, Tensor], prefix: str, x: Tensor, before: PlainState) -> tuple[Tensor, PlainState]:
    def matrix(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{prefix}{name}.weight"].T

    def mixed(now: Tensor, previous: Tensor, name: str) -> Tensor:
        mix = weights[prefix + name].flatten()
        return mix * now + (1 - mix) * previous

    att = normalised(weights, f"{prefix}ln1", x)
    r = matrix("att.receptance", mixed(att, before.att_shift, "att.time_mix_r"))
    k = matrix("att.key", mixed(att, before.att_shift, "att.time_mix_k"))
    v = matrix("att.value", mixed(att, before.att_shift, "att.time_mix_v"))
    now = torch.exp(weights[f"{prefix}att.time_first"] + k)
    average = (before.N + now * v) / (before.D + now)
    decay = torch.exp(-torch.exp(weights[f"{prefix}att.time_decay"]))
    N, D = decay * before.N + k.exp() * v, decay * before.D + k.exp()
    x = x + matrix("att.output", r.sigmoid() * average)
    ffn = normalised(weights, f"{prefix}ln2", x)
    r = matrix("ffn.receptance", mixed(ffn, before.ffn_shift, "ffn.time_mix_r"))
    k = matrix("ffn.key", mixed(ffn, before.ffn_shift, "ffn.time_mix_k")).clamp(min=0).square()
    return x + r.sigmoid() * matrix("ffn.value", k), PlainState(att, ffn, N, D)


def normalised(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    scale = (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return deviation / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]
