"""Training whole models of equal size: tokens per second of RWKV and of a transformer, against T."""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.device import Call, Device, timed
from benchmarks.records import Record, Row
from benchmarks.transformer import SIZES, VOCAB, Transformer, parameters
from rwkv_kernels.nn import RWKV

TITLE = "A training step of a language model: forward, backward and AdamW"

TOKENS = {"cuda": 2**15, "cpu": 2**12, "smoke": 256}  # in every step, for every T
LENGTHS = {"cuda": [2**9, 2**11, 2**13, 2**15], "cpu": [2**7, 2**9, 2**11, 2**12], "smoke": [128]}
PATIENCE = 16.0  # seconds for the runs of the slower model


def run(device: Device, record: Record) -> None:
    """A row for every length and model."""
    channels, layers = SIZES[device.scale]
    rows: list[Row] = []
    for T in LENGTHS[device.scale]:
        torch.manual_seed(0)
        with device.default():
            models: dict[str, nn.Module] = {
                "RWKV": RWKV(VOCAB, channels, layers),
                "transformer": Transformer(VOCAB, channels, layers, T),
            }
            tokens = torch.randint(VOCAB, (TOKENS[device.scale] // T, T + 1))
        steps = {name: _training_step(model, tokens, device) for name, model in models.items()}
        for name, samples in device.patiently(steps, PATIENCE).items():
            rate = TOKENS[device.scale] / statistics.median(samples)
            where = {"T": T, "B": tokens.shape[0], "model": name, "parameters": parameters(models[name])}
            rows.append({**where, **timed(samples), "tokens/s": rate})
        record.add(TITLE, ["T", "model"], rows)


def _training_step(model: nn.Module, tokens: Tensor, device: Device) -> Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.is_gpu):
            logits = model(tokens[:, :-1])
            if isinstance(model, RWKV):
                logits, _ = logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return step
