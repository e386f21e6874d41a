"""Checkpoints in the formats that RWKV-4 is published in: RWKV-LM's .pth, safetensors, and transformers' folders.

Inside the package, parameters have RWKV-LM's names. transformers has others, writes the model's sizes to config.json,
and in eval mode divides two matrices of every layer by 2^(layer // rescale_every), which no entry of the folder tells.
"""

import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files

# RWKV-LM's parts of names, and transformers'.
NAMES = [
    ("emb.", "embeddings."),
    (".ln0.", ".pre_ln."),
    (".att.", ".attention."),
    (".ffn.", ".feed_forward."),
    (".time_mix_k", ".time_mix_key"),
    (".time_mix_v", ".time_mix_value"),
    (".time_mix_r", ".time_mix_receptance"),
]
PREFIX = "rwkv."

CONFIG = "config.json"
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]

LAYER_NORM_EPSILON = 1e-5
# As published. It keeps transformers from overflowing in float16; otherwise only the epsilon of layer norms feels it.
RESCALE_EVERY = 6
RESCALED = (".att.output.weight", ".ffn.value.weight")
NOT_RESCALED = (".att.value.weight", ".ffn.key.weight")

# A parameter's ending that only this version has, the newest version first.
OTHER_VERSIONS = [
    ("RWKV-7", ".att.x_r"),
    ("RWKV-6", ".att.time_maa_k"),
    ("RWKV-5", ".att.ln_x.weight"),
    ("RWKV-4a or RWKV-4b, with tiny attention", ".tiny_ln.weight"),
]


def to_transformers(name: str) -> str:
    """RWKV-LM's name of a parameter -> that of RwkvForCausalLM."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith("head.") else PREFIX + name


def from_transformers(name: str) -> str:
    """The inverse of `to_transformers`."""
    for ours, theirs in NAMES:
        name = name.replace(theirs, ours)
    return name.removeprefix(PREFIX)


def other_version(names: Collection[str]) -> str | None:
    """Which RWKV the names belong to, and by what it is known, where it is not RWKV-4."""
    for version, ending in OTHER_VERSIONS:
        for name in names:
            if name.endswith(ending):
                return f"{version} (it has {name})"
    return None


def load(path: Path, rescaled: bool) -> dict[str, Tensor]:
    """The tensors of a file or folder by RWKV-LM's names."""
    config = _read_json(path / CONFIG) if path.is_dir() else {}
    if path.is_dir():
        _check_config(path / CONFIG, config)
    tensors = _read_folder(path) if path.is_dir() else files.read(path)
    every = config.get("rescale_every", RESCALE_EVERY)
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {from_transformers(name): tensor for name, tensor in tensors.items()}
        if not rescaled and _looks_rescaled(tensors, every):
            warnings.warn(
                f"{path}: transformers seems to have rescaled its layers before it was written, because att.output and "
                f"ffn.value halve every {every} layers and nothing else does: from_pretrained(..., rescaled=True) "
                "undoes that",
                stacklevel=3,
            )
    if config.get("tie_word_embeddings") and "emb.weight" in tensors:
        tensors.setdefault("head.weight", tensors["emb.weight"].clone())
    if rescaled:
        tensors = {name: _undo_rescaling(name, tensor, every) for name, tensor in tensors.items()}
    return tensors


def _looks_rescaled(tensors: Mapping[str, Tensor], every: int) -> bool:
    """Whether both matrices that transformers rescales halve, from layer to layer, wherever it would halve them.

    Layers differ in size anyway, though by less than a factor of two, and matrices of a layer together. So what counts
    is a change beside the usual one between the layers of that matrix, and beside that of matrices not rescaled.
    """
    layers = sum(name.endswith(RESCALED[0]) for name in tensors)
    if not 1 < every < layers:
        return False  # nothing is rescaled, or nothing is left to tell the usual change from

    def changes(ending: str) -> Tensor:
        """The binary logarithms of the matrix's size in each layer over that in the one before."""
        sizes = [
            torch.linalg.vector_norm(tensors.get(f"blocks.{layer}{ending}", torch.zeros(1)), dtype=torch.float64)
            for layer in range(layers)
        ]
        return torch.stack(sizes).log2().diff()

    halved = torch.arange(1, layers) % every == 0
    drops = [change[halved] - change[~halved].median() for change in map(changes, RESCALED)]
    others = torch.stack([change[halved].mean() for change in map(changes, NOT_RESCALED)])
    both = torch.cat(drops)
    # Comparisons are false for the NaN of matrices that are zero, which show nothing.
    return bool((both < -0.5).all() and (both.mean() + 1).abs() < 0.35 and (others.abs() < 0.5).all())


def _undo_rescaling(name: str, tensor: Tensor, every: int) -> Tensor:
    if every > 0 and name.endswith(RESCALED):
        return tensor * float(2 ** (int(name.split(".")[1]) // every))
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    hidden_size = config.get("hidden_size")
    expected = {
        "model_type": ("rwkv",),
        "attention_hidden_size": (None, hidden_size),
        "layer_norm_epsilon": (None, LAYER_NORM_EPSILON),
    }
    faults = [
        f"{name}: expected {values[-1]!r}, got {config.get(name)!r}"
        for name, values in expected.items()
        if config.get(name) not in values
    ]
    if faults:
        raise ValueError(f"{path}: not the configuration of an RWKV-4 model: {'; '.join(faults)}")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHTS:
        path = folder / name
        if path.exists():
            return files.read(path) if path.suffix != ".json" else _read_parts(path)
    raise FileNotFoundError(f"{folder}: expected one of {', '.join(WEIGHTS)}")


def _read_parts(index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected a weight_map of names and files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: expected files of the same folder, got {name!r}")
        tensors |= files.read(index.parent / name)
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors as the path asks for: a .pth, .pt or .safetensors file, or else a transformers folder."""
    if path.suffix in (".pth", ".pt", files.SAFETENSORS):
        files.write(path, tensors)
        return
    path.mkdir(parents=True, exist_ok=True)
    vocab_size, hidden_size = tensors["emb.weight"].shape
    config = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "attention_hidden_size": hidden_size,
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith(".att.time_decay") for name in tensors),
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "rescale_every": RESCALE_EVERY,
        "tie_word_embeddings": False,
        "torch_dtype": str(tensors["emb.weight"].dtype).removeprefix("torch."),
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files.write(path / WEIGHTS[0], {to_transformers(name): tensor for name, tensor in tensors.items()})


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path, which must exist."""
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"{found}: no such file or folder; checkpoints are read from disk and never downloaded")
    return found
