"""Models with noise on every parameter: the initial zeros would hide whole branches."""

from typing import TypeVar

import torch
from torch import Tensor

from rwkv_kernels.nn import RWKV, RWKVState

V, C = 23, 16

Model = TypeVar("Model", bound=torch.nn.Module)


def randomised(model: Model) -> Model:
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def rwkv(dtype: torch.dtype = torch.float64, layers: int = 3, hidden: int | None = None) -> RWKV:
    """The same RWKV in every test, of V tokens and C channels: drawn in float64, then rounded."""
    torch.manual_seed(0)
    return randomised(RWKV(V, C, layers, hidden).double()).to(dtype)


def leaf_state(model: RWKV, sequences: int) -> RWKVState:
    """Every sequence another one, as leaves."""
    tokens = torch.randint(V, (sequences, 7), generator=torch.Generator().manual_seed(2), device="cpu")
    with torch.no_grad():
        _, state = model(tokens.to(torch.get_default_device()))
    return RWKVState(*(x.requires_grad_() for x in state))


def loss_up_to_gauge(logits: Tensor, state: RWKVState) -> Tensor:
    """A loss that depends on every logit and on the state up to its gauge."""
    num, den, top = state.wkv.unbind(-2)
    log_den = torch.where(den > 0, top + den.clamp(min=1e-30).log(), 0)
    mean = torch.where(den > 0, num / den.clamp(min=1e-30), 0)
    return sum(x.sin().sum() for x in (3 * logits, state.att_shift, state.ffn_shift, mean, log_den))  # type: ignore[return-value]
