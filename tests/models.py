"""Models with noise on every parameter: the initial zeros would hide whole branches."""

from typing import TypeVar

import torch

from rwkv_kernels.nn import RWKV

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
