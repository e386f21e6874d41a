"""transformers' RWKV before and after `rwkv_kernels.compat.transformers.patch()`: forward, and a step of training."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks.device import Device, timed
from benchmarks.problem import Shape, written
from benchmarks.records import Record, Row
from rwkv_kernels.compat import transformers as compat

TITLE = "transformers' RwkvForCausalLM before and after the patch, 4 layers, float32"

# With gradients, the loop's time grows with T²: every step of it writes a whole gradient of k and of v.
SHAPES = [(4, 512, 768), (1, 4096, 768)]
LAYERS, VOCAB = 4, 256  # a model of bytes: with a large vocabulary, the head would take most of both times
RUNS = 3
LONGEST_OF_MANY_RUNS = 512  # beyond it, the loop is measured once


def run(device: Device, record: Record) -> None:
    """Seconds before and after of the model and of its operator, and their ratio."""
    try:
        import transformers
    except ImportError as error:
        print(f"transformers is not installed, so there is nothing to compare with ({error})")
        return
    transformers.logging.set_verbosity_error()
    rows: list[Row] = []
    for shape in [(2, 16, 32)] if device.smoke else SHAPES:
        with record.attempt(f"{shape}"):
            rows += _rows(device, shape, transformers.__version__)
            record.add(TITLE, ["B, T, C", "operation", "code"], rows)


def _rows(device: Device, shape: Shape, version: str) -> list[Row]:
    import transformers

    B, T, C = shape
    torch.manual_seed(0)
    config = transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=C, num_hidden_layers=LAYERS, use_cache=False)
    model = transformers.RwkvForCausalLM(config).to(device.type).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokens = torch.randint(VOCAB, (B, T), device=device.type)
    modeling = transformers.models.rwkv.modeling_rwkv
    modeling.rwkv_cuda_kernel = None  # it would refuse long sequences and, for some, write out of bounds
    w, u = torch.randn(2, C, device=device.type, requires_grad=True)
    k, v, gy = torch.randn(3, B, T, C, device=device.type, requires_grad=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits  # type: ignore[no-any-return]

    def training_step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    def operator() -> None:
        with torch.no_grad():
            modeling.rwkv_linear_attention(w, u, k, v)

    def operator_and_backward() -> None:
        torch.autograd.grad(modeling.rwkv_linear_attention(w, u, k, v)[0], (w, u, k, v), gy)

    expected = forward()
    with compat.patched():
        torch.testing.assert_close(forward(), expected, rtol=1e-3, atol=1e-3)

    ways = {f"transformers {version}": nullcontext, "patched": compat.patched}
    rows: list[Row] = []
    for name, call in [
        ("forward", forward),
        ("training step", training_step),
        ("WKV of one layer", operator),
        ("WKV of one layer with gradients", operator_and_backward),
    ]:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(-1, RUNS):  # the first one warms up
            for way, context in ways.items():
                if T > LONGEST_OF_MANY_RUNS and context is nullcontext and turn != 0:
                    continue
                with context():
                    elapsed = _seconds(call, device)
                if turn >= 0:
                    seconds[way].append(elapsed)
        before = statistics.median(next(iter(seconds.values())))
        for way, samples in seconds.items():
            where = {"B, T, C": written(shape), "operation": name, "code": way}
            rows.append({**where, **timed(samples), "times faster": before / statistics.median(samples)})
    return rows


def _seconds(call: Callable[[], object], device: Device) -> float:
    # Not torch's Timer, which warms up before every measurement: the loop is too slow for that.
    started = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - started
