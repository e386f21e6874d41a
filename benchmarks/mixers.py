"""Token mixers of language models: the same four projections around different operations over time.

Each operation is a function of (r, k, v), all [B, T, C], and returns [B, T, C]; step t depends on steps up to t. For
attention, r is the query. Sources: WKV and the gate sigmoid(r), arXiv 2305.13048, equations 14 and 15; AFT-full and
AFT-simple, arXiv 2105.14103, in their causal form.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rwkv_kernels import wkv

HEAD_CHANNELS = 64


def heads(x: Tensor) -> Tensor:
    """[B, T, C] -> [B, heads, T, channels of a head]."""
    return x.unflatten(-1, (-1, min(HEAD_CHANNELS, x.shape[-1]))).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, heads, T, channels of a head] -> [B, T, C]."""
    return x.transpose(1, 2).flatten(2)


def _future(T: int) -> Tensor:
    """[T, T], true where step t must not see step s."""
    return torch.ones(T, T, dtype=torch.bool).triu(1)


class Wkv(nn.Module):
    """The operator of this package, gated."""

    def __init__(self, T: int, C: int) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.linspace(-5, 1, C)), nn.Parameter(torch.zeros(C))

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In O(T) time and memory."""
        return torch.sigmoid(r) * wkv(self.w, self.u, k, v)


class NaiveAttention(nn.Module):
    """Softmax attention with the whole T×T matrix of scores."""

    future: Tensor

    def __init__(self, T: int, C: int) -> None:
        super().__init__()
        self.register_buffer("future", _future(T))

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In O(T²) time and memory."""
        q, k, v = map(heads, (r, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return joined(scores.masked_fill(self.future, -torch.inf).softmax(-1) @ v)


class TorchAttention(nn.Module):
    """torch's scaled_dot_product_attention by one of its backends."""

    def __init__(self, T: int, C: int, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In O(T²) time and O(T) memory; with the backend "math" in O(T²)."""
        with sdpa_kernel(self.backend):
            return joined(F.scaled_dot_product_attention(heads(r), heads(k), heads(v), is_causal=True))


class AftFull(nn.Module):
    """The attention-free transformer: a learnt bias for every pair of positions, a softmax for every channel."""

    future: Tensor

    def __init__(self, T: int, C: int) -> None:
        super().__init__()
        self.register_buffer("future", _future(T))
        self.biases = nn.Parameter(torch.zeros(T, T))

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In O(T²) time and memory."""
        biases = self.biases.masked_fill(self.future, -torch.inf)
        weights = (biases - biases.amax(1, keepdim=True)).exp().to(k.dtype)
        of_key = (k - k.amax(1, keepdim=True)).exp()
        return torch.sigmoid(r) * (weights @ (of_key * v)) / (weights @ of_key)


class AftSimple(nn.Module):
    """The attention-free transformer without biases: every earlier step counts by its key alone."""

    def __init__(self, T: int, C: int) -> None:
        super().__init__()

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In O(T) time and memory."""
        of_key = (k - k.amax(1, keepdim=True)).exp()
        return torch.sigmoid(r) * (of_key * v).cumsum(1) / of_key.cumsum(1)


class Mixer(nn.Module):
    """x [B, T, C] -> [B, T, C]: projections to r, k and v, the operation over time, a projection of its result."""

    def __init__(self, C: int, look_back: nn.Module) -> None:
        super().__init__()
        self.receptance, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.look_back = look_back

    def forward(self, x: Tensor) -> Tensor:
        """The mixer's output."""
        out: Tensor = self.output(self.look_back(self.receptance(x), self.key(x), self.value(x)))
        return out


class Lstm(nn.Module):
    """torch's LSTM, whose own four projections of the input stand for r, k and v, and one of its output."""

    def __init__(self, T: int, C: int) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(C, C, batch_first=True), nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The mixer's output, in O(T) time, one step after the other."""
        out: Tensor = self.output(self.lstm(x)[0])
        return out


SDPA = {
    f"attention, torch {backend.name.removesuffix('_ATTENTION').lower()}": backend
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    )
}
LOOK_BACK: dict[str, Callable[[int, int], nn.Module]] = {
    "WKV": Wkv,
    "attention, naive": NaiveAttention,
    **{name: lambda T, C, backend=backend: TorchAttention(T, C, backend) for name, backend in SDPA.items()},
    "AFT-full": AftFull,
    "AFT-simple": AftSimple,
}
NAMES = [*LOOK_BACK, "LSTM"]


def make(name: str, T: int, C: int) -> nn.Module:
    """The mixer of this name, for T steps and a width of C, with the same parameters each time."""
    torch.manual_seed(0)
    return Lstm(T, C) if name == "LSTM" else Mixer(C, LOOK_BACK[name](T, C))
