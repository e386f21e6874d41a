"""The recipes of docs/recipes.md do what they say."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_tensor_close
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_kernels.nn import RWKV

RECIPES = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def _run(heading: str) -> dict[str, Any]:
    """The names that the recipe's code leaves."""
    names: dict[str, Any] = {}
    (code,) = re.findall(rf"^## {heading}\n(?:(?!^## ).*\n)*?```python\n((?:.*\n)*?)```", RECIPES, re.MULTILINE)
    exec(code, names)
    return names


@pytest.fixture
def single_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_compiled_decoding_gives_the_tokens_of_the_parallel_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Inductor makes of a step is tested elsewhere, and costs a minute of C++.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    made = _run("Compiled decoding")
    tokens, model = made["tokens"], made["model"]
    assert list(tokens.shape) == [2, 15]
    logits, _ = model(tokens[:, :-1])
    assert torch.equal(logits[:, 9:].argmax(-1), tokens[:, 10:])


class _Calls(TorchDispatchMode):
    """The operators that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_runs_the_operator_once() -> None:
    with _Calls() as calls:
        model = _run("Selective checkpointing")["model"]
    assert calls.operators.count(torch.ops.rwkv_kernels.wkv_forward.default) == len(model.blocks)
    # The matrix products ran twice: a recipe that recomputes nothing would show nothing.
    products = calls.operators.count(torch.ops.aten.mm.default)
    for block in model.blocks:
        block.forward = type(block).forward.__get__(block)
    with _Calls() as calls:
        model(torch.randint(50, (2, 10)))[0].square().mean().backward()
    assert products > calls.operators.count(torch.ops.aten.mm.default)


def test_selective_checkpointing_gives_the_gradients_of_the_whole() -> None:
    model = _run("Selective checkpointing")["model"]
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(50, (2, 10))
    plain = RWKV.from_state_dict(model.state_dict())
    gradients = [torch.autograd.grad(m(tokens)[0].square().sum(), list(m.parameters())) for m in (model, plain)]
    for (name, _), found, expected in zip(plain.named_parameters(), *gradients, strict=True):
        assert_tensor_close(name, found, expected, 1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_fsdp2_trains_in_bfloat16_with_a_float32_state(single_process: None) -> None:
    made = _run("FSDP2 in bfloat16")
    assert made["logits"].dtype == made["state"].att_shift.dtype == torch.bfloat16
    assert made["state"].wkv.dtype == torch.float32
    assert list(made["generated"].shape) == [2, 15]
    (group,) = made["optimizer"].param_groups
    assert {parameter.dtype for parameter in group["params"]} == {torch.float32}
