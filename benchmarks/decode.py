"""Generation token by token: time and memory against what has been generated, by a state and by a key-value cache."""

import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.device import Device, powers_of_two, timed
from benchmarks.records import Record, Row
from benchmarks.transformer import SIZES, VOCAB, KeyValueCache, Transformer, parameters
from rwkv_kernels.nn import RWKV

TITLE = "Generation of one sequence: a token after so many others, and all of them together"

BATCH = 1
SHORTEST = 128
LONGEST = {"cuda": 2**13, "cpu": 2**13, "smoke": 256}
SAMPLED = 64  # tokens before a length, whose times are those of a token there
BURST = 16  # tokens that one model generates before the other has its turn


@torch.no_grad()
def run(device: Device, record: Record) -> None:
    """Both models generate, taking turns; rows for T = 128, 256, ... tokens."""
    (channels, layers), longest = SIZES[device.scale], LONGEST[device.scale]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.is_gpu else torch.float32
    with device.default():
        rwkv = RWKV(VOCAB, channels, layers).to(dtype).eval()
        transformer = Transformer(VOCAB, channels, layers, longest).to(dtype).eval()
        _check(transformer)
    state, cache = rwkv.empty_state(BATCH), KeyValueCache(transformer, BATCH, longest)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "RWKV, state": lambda token: rwkv.step(token, state),
        "transformer, cache": lambda token: transformer.step(token, cache),
    }
    of_state = sum(part.numel() * part.element_size() for part in (state.att_shift, state.ffn_shift, state.wkv))
    held = {"RWKV, state": lambda T: of_state, "transformer, cache": cache.bytes_of}
    counts = {"RWKV, state": parameters(rwkv), "transformer, cache": parameters(transformer)}
    seconds = _generate(device, steps, longest)

    rows: list[Row] = []
    for name, samples in seconds.items():
        together = list(accumulate(samples))
        for T in powers_of_two(SHORTEST, longest):
            rows.append(
                {
                    "model": name,
                    "parameters": counts[name],
                    "tokens": T,
                    **timed(samples[T - SAMPLED : T]),
                    "all of them, s": together[T - 1],
                    "state or cache, MB": held[name](T) / 1e6,
                }
            )
    record.add(TITLE, ["model", "tokens"], rows)


def _generate(device: Device, steps: dict[str, Callable[[Tensor], Tensor]], tokens: int) -> dict[str, list[float]]:
    """Seconds of every token, the likeliest being taken each time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    chosen = {name: torch.zeros(BATCH, dtype=torch.int64, device=device.type) for name in steps}
    for _ in range(tokens // BURST):
        for name, step in steps.items():
            for _ in range(BURST):
                started = time.perf_counter()
                chosen[name] = step(chosen[name]).argmax(-1)
                device.synchronize()
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _check(transformer: Transformer) -> None:
    """Compares the cache with the whole sequence at once, as the package's tests do with RWKV's state."""
    tokens = torch.randint(VOCAB, (BATCH, 24))
    cache = KeyValueCache(transformer, BATCH, tokens.shape[1])
    one_by_one = torch.stack([transformer.step(token, cache) for token in tokens.unbind(1)], 1)
    at_once = transformer(tokens)
    error = float((one_by_one - at_once).abs().max() / at_once.abs().max())
    assert error < 20 * torch.finfo(at_once.dtype).eps, f"the cache changes logits by {error:.1e}"
