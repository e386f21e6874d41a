"""Small models of the installed transformers, and their names in RWKV-LM's terms, for the tests."""

import re
from typing import Any

import pytest
import torch
from models import randomised
from torch import Tensor

V, C, L, HIDDEN = 23, 16, 3, 40

NAMES = [
    (r"^rwkv\.", ""),
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.time_mix_key$", ".time_mix_k"),
    (r"\.time_mix_value$", ".time_mix_v"),
    (r"\.time_mix_receptance$", ".time_mix_r"),
]


def rwkv_lm_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A RwkvForCausalLM with every parameter random: the initial values would hide whole branches."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "intermediate_size": HIDDEN}
    config = transformers.RwkvConfig(**(sizes | {"rescale_every": 0, "bos_token_id": 0, "eos_token_id": 0} | settings))
    return randomised(transformers.RwkvForCausalLM(config).double()).to(dtype)


def weights(model: Any) -> dict[str, Tensor]:
    """Float64 copies of the parameters that require gradients, by RWKV-LM's names."""
    named = model.named_parameters(remove_duplicate=False)
    return {rwkv_lm_name(name): x.detach().double().clone().requires_grad_() for name, x in named}


def tokens(batch: int, steps: int) -> Tensor:
    """The same tokens on every device, and on torch's default one."""
    drawn = torch.randint(1, V, (batch, steps), generator=torch.Generator().manual_seed(1), device="cpu")
    return drawn.to(torch.get_default_device())
