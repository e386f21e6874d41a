"""The next token of a batch from its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def sample(logits: Tensor, temperature: float, top_p: float, generator: Generators) -> Tensor:
    """Logits [B, V] -> tokens [B]; with one generator for each sequence, a row's draw does not depend on the others."""
    if temperature == 0:
        return logits.argmax(-1)
    likeliest, order = torch.softmax(logits.float() / temperature, -1).sort(descending=True)
    # A token stays while those before it fall short of top_p, so the likeliest one always does.
    kept = likeliest * (likeliest.cumsum(-1) - likeliest < top_p)
    if generator is None or isinstance(generator, torch.Generator):
        chosen = torch.multinomial(kept, 1, generator=generator)
    else:
        chosen = torch.stack([torch.multinomial(row, 1, generator=g) for row, g in zip(kept, generator, strict=True)])
    return order.gather(-1, chosen).squeeze(-1)
