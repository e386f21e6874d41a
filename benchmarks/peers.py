"""The operator against what people run today on a CPU: the loop over time in transformers."""

from collections.abc import Callable

import torch

import rwkv_kernels
from benchmarks import harness

TITLE = "Peers on the CPU, float32"

SHAPE = (4, 512, 768)


def run(smoke: bool) -> list[harness.Row]:
    """Milliseconds of forward, and of forward and backward, and how many times faster this package is."""
    try:
        import transformers
        from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu
    except ImportError as error:
        print(f"transformers is not installed, so there is no peer to compare with ({error})")
        return []
    B, T, C = (2, 16, 32) if smoke else SHAPE
    w, u = (torch.randn(C) - 1).requires_grad_(), torch.randn(C).requires_grad_()
    k, v = torch.randn(B, T, C, requires_grad=True), torch.randn(B, T, C, requires_grad=True)
    gy = torch.randn(B, T, C)

    def loop() -> torch.Tensor:
        return rwkv_linear_attention_cpu(w, u, k, v)[0]  # type: ignore[no-any-return]

    def ours() -> torch.Tensor:
        return rwkv_kernels.wkv(w, u, k, v, backend="cpu")

    torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-4)

    def differentiated(function: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(function(), (w, u, k, v), gy)

    def without_gradient(function: Callable[[], torch.Tensor]) -> object:
        with torch.no_grad():
            return function()

    rows: list[harness.Row] = []
    # The loop is so slow that it needs no warm-up and, with gradients, no second run.
    for name, call, loop_runs in [("forward", without_gradient, 3), ("forward and backward", differentiated, 1)]:
        seconds = {
            **harness.alternate({"loop": lambda run, call=call: call(loop)}, loop_runs, warm_up=0),
            **harness.alternate({"ours": lambda run, call=call: call(ours)}, 2 if smoke else harness.RUNS),
        }
        medians = {who: harness.quartiles(samples)[1] for who, samples in seconds.items()}
        rows.append(
            {
                "shape": f"{B}, {T}, {C}",
                "operation": name,
                f"transformers {transformers.__version__}, ms": medians["loop"] * 1e3,
                "rwkv_kernels, ms": medians["ours"] * 1e3,
                "times faster": medians["loop"] / medians["ours"],
                "_seconds": seconds,
            }
        )
    return rows
