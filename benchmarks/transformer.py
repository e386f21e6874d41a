"""A transformer as plain as RWKV-4, to measure beside it: pre-norm, its parameters only matrices and layer norms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_CHANNELS = 64

# The sizes of the compared models, RWKV and this one.
VOCAB = 256
SIZES = {"cuda": (1024, 12), "cpu": (256, 4), "smoke": (64, 1)}  # channels and layers


class KeyValueCache:
    """Keys and values of the tokens so far, [L, 2, B, heads, T, channels of a head], with room for T of them."""

    def __init__(self, model: "Transformer", batch: int, room: int) -> None:
        weight, heads = model.emb.weight, model.emb.embedding_dim // HEAD_CHANNELS
        self.kept = weight.new_zeros(len(model.blocks), 2, batch, heads, room, HEAD_CHANNELS)
        self.length = 0

    def bytes_of(self, tokens: int) -> int:
        """The bytes that this many tokens take."""
        return self.kept[..., :tokens, :].numel() * self.kept.element_size()


class Block(nn.Module):
    """Attention, then two layers of GELU, both on a layer norm of the residual stream and added to it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels, bias=False)
        self.up, self.down = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor, kept: Tensor | None = None, length: int = 0) -> Tensor:
        """x [B, T, C] -> [B, T, C]; with the layer's cache, one token after `length` others, which is added to it."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, -1, HEAD_CHANNELS)).permute(2, 0, 3, 1, 4)
        if kept is not None:
            kept[:, :, :, length] = torch.stack((k, v))[:, :, :, 0]
            k, v = kept[:, :, :, : length + 1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=kept is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.ln2(x))))
        return out


class Transformer(nn.Module):
    """A causal language model; its sizes are named as those of `rwkv_kernels.nn.RWKV`.

    Its inner width is 4.5 C, which gives a layer the 13 C² parameters that one of RWKV-4 has.
    """

    def __init__(self, vocab_size: int, channels: int, layers: int, longest: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, channels)
        self.blocks = nn.ModuleList(Block(channels, 9 * channels // 2) for _ in range(layers))
        self.ln_out = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocab_size, bias=False)
        angles = torch.arange(longest)[:, None] * 1e4 ** -torch.linspace(0, 1, channels // 2)
        self.register_buffer("positions", torch.cat((angles.sin(), angles.cos()), 1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> logits [B, T, V]."""
        x = self.emb(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.ln_out(x))
        return logits

    def step(self, token: Tensor, cache: KeyValueCache) -> Tensor:
        """A token [B] -> logits [B, V]; the cache grows by it."""
        x = (self.emb(token) + self.positions[cache.length])[:, None]
        for block, kept in zip(self.blocks, cache.kept, strict=True):
            x = block(x, kept, cache.length)
        cache.length += 1
        logits: Tensor = self.head(self.ln_out(x))[:, 0]
        return logits


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
