"""A program: transformers' RwkvForCausalLM, unpatched, on the kernel that `kernels` loads, against its own loop.

    LOCAL_KERNELS=kernels-community/rwkv=build/hub python hub_in_transformers.py
    python hub_in_transformers.py build/hub    for versions of transformers that refuse this version of `kernels`

transformers calls its kernel on a GPU alone. Without one, its module for RWKV, and only that, reads "cuda" as every
tensor's device, and the tensors that it makes there lie on the CPU. No line of it is changed.
"""

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers_models
from problems import assert_tensor_close, tolerance
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.rwkv import modeling_rwkv

import rwkv_kernels

T = 11
# Either computation rounds as one operator does, in every layer, with independent errors. The model's keys are below 4.
CLOSE = math.sqrt(2 * transformers_models.L) * tolerance(torch.float32, T, 4.0)


class PretendedGPU(TorchFunctionMode):
    """Pretends a GPU to transformers' module, which the calling frame identifies."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if sys._getframe(1).f_globals.get("__name__") == modeling_rwkv.__name__:
            if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
                return torch.device("cuda")
            if "device" in kwargs:
                kwargs = kwargs | {"device": "cpu"}
        return function(*args, **kwargs)


def no_loop(*_: Any, **__: Any) -> Any:
    raise AssertionError("transformers took its loop and not the kernel")


@contextlib.contextmanager
def on_the_kernel() -> Any:
    """The kernel for everything but single tokens, for which transformers takes its loop on every device."""
    loop = modeling_rwkv.rwkv_linear_attention_cpu
    modeling_rwkv.rwkv_linear_attention_cpu = no_loop
    with contextlib.nullcontext() if torch.cuda.is_available() else PretendedGPU():
        yield
    modeling_rwkv.rwkv_linear_attention_cpu = loop


def loss_and_gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


def continued(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Two calls, the second of which continues from the state of the first."""
    with torch.no_grad():
        first = model(tokens[:, :5], use_cache=True)
        second = model(tokens[:, 5:], state=first.state, use_cache=True)
    ffn, att, num, den, top = second.state
    return {"logits": second.logits, "ffn": ffn, "att": att, "mean": num / den, "log_den": den.log() + top}


def compare(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, exact in expected.items():
        assert exact.abs().max() > 0, name
        assert_tensor_close(f"{what}, {name}", found[name], exact, CLOSE, 1e-3)


def main(path: str | None = None) -> None:
    modeling_rwkv.is_torch_cuda_available = lambda: True
    if path is not None:
        import kernels

        modeling_rwkv.rwkv_cuda_kernel = kernels.get_local_kernel(Path(path))
        modeling_rwkv.rwkv_cuda_kernel.max_seq_length = 1024
    model = transformers_models.make(torch.float32, context_length=1024)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kernel = modeling_rwkv.rwkv_cuda_kernel
    assert kernel is not None, "transformers has not loaded its kernel"
    # The copy, and not the package that this program imports, too.
    assert kernel.__name__.startswith("_rwkv4_") and kernel.wkv is not rwkv_kernels.wkv
    assert kernel.max_seq_length == 1024, "transformers sets it"

    for batch in (1, 2, 3):
        tokens = transformers_models.tokens(batch, T).to(model.device)
        for what, run in (("training", loss_and_gradients), ("continued", continued)):
            model.train(what == "training")
            expected = on_the_loop(run, model, tokens)
            with on_the_kernel():
                compare(f"{what}, B = {batch}", run(model, tokens), expected)
    print(f"{kernel.__name__}: equal to the loop")


def on_the_loop(run: Any, model: Any, tokens: Tensor) -> dict[str, Tensor]:
    kernel, modeling_rwkv.rwkv_cuda_kernel = modeling_rwkv.rwkv_cuda_kernel, None
    expected: dict[str, Tensor] = run(model, tokens)
    modeling_rwkv.rwkv_cuda_kernel = kernel
    return expected


if __name__ == "__main__":
    main(*sys.argv[1:])
