"""The code of README.md, docs/wkv.md, docs/bidirectional.md and docs/recipes.md does what they say."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised
from problems import assert_tensor_close
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_kernels import native, wkv
from rwkv_kernels.nn import RWKV

ROOT = Path(__file__).parents[1]
README, RECIPES = ((ROOT / name).read_text() for name in ("README.md", "docs/recipes.md"))


def _run(heading: str) -> dict[str, Any]:
    """The names that the recipe's code defines."""
    names: dict[str, Any] = {}
    (code,) = re.findall(rf"^## {heading}\n(?:(?!^## ).*\n)*?```python\n((?:.*\n)*?)```", RECIPES, re.MULTILINE)
    exec(code, names)
    return names


@pytest.mark.parametrize(("document", "least"), [("docs/wkv.md", 11), ("docs/bidirectional.md", 2)])
def test_the_snippets_of_the_derivation_run_as_they_stand(document: str, least: int) -> None:
    if native.operators.why_missing is not None:
        pytest.skip(native.operators.why_missing)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(snippets) >= least
    for code in snippets:
        exec(compile(code, document, "exec"), {})


def test_the_readme_runs_and_its_few_lines_of_torch_are_the_operator() -> None:
    names: dict[str, Any] = {}
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec("\n".join(code), names)
    assert names["y"].device.type == names["device"]
    assert all(names[name].grad is not None for name in "wukv")
    w, u = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, expected = names["wkv_by_softmax"](w, u, k, v), wkv(w, u, k, v)
    torch.testing.assert_close(found, expected)
    gy = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, (w, u, k, v), gy) for y in (found, expected))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_compiled_decoding_gives_the_tokens_of_the_parallel_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor's code for a step is tested elsewhere, and costs a minute of C++.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    made = _run("Compiled decoding")
    tokens, model = made["tokens"], made["model"]
    assert list(tokens.shape) == [2, 15]
    logits, _ = model(tokens[:, :-1])
    assert torch.equal(logits[:, 9:].argmax(-1), tokens[:, 10:])


def test_packed_documents_train_as_each_alone() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    made = _run("Packed documents")
    model, batch, logits = made["model"], made["batch"], made["logits"]
    assert made["state"].wkv.shape[1] == 4 and made["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
    randomised(model)
    logits, _ = model(batch["input_ids"], cu_seqlens=batch["cu_seq_lens_q"])
    alone = torch.cat([model(torch.tensor([document["input_ids"]]))[0] for document in made["documents"]], 1)
    assert_tensor_close("logits", logits, alone, 1e-5)
    losses = [F.cross_entropy(x[0, :-1], batch["labels"][0, 1:]) for x in (logits, alone)]
    torch.testing.assert_close(*losses)


class _Calls(TorchDispatchMode):
    """Records the operators that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_runs_the_operator_once() -> None:
    with _Calls() as calls:
        model = _run("Selective checkpointing")["model"]
    assert calls.operators.count(torch.ops.rwkv_kernels.wkv_mixing_forward.default) == len(model.blocks)
    # The matrix products ran twice: a recipe that recomputes nothing would show nothing.
    products = calls.operators.count(torch.ops.aten.mm.default)
    for block in model.blocks:
        block.forward = type(block).forward.__get__(block)
    with _Calls() as calls:
        model(torch.randint(50, (2, 10)))[0].square().mean().backward()
    assert products > calls.operators.count(torch.ops.aten.mm.default)


def test_selective_checkpointing_gives_the_gradients_of_the_whole() -> None:
    model = randomised(_run("Selective checkpointing")["model"])
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


def _run_in_process(rank: int, heading: str, kept: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    names = _run(heading)
    if rank == 0:
        torch.save((names["batch"], names[kept].state_dict()), f"{folder}/result")
    torch.distributed.destroy_process_group()


def test_ddp_makes_the_steps_of_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_run_in_process, ("DDP", "model", str(tmp_path)), nprocs=2)
    batch, found = torch.load(tmp_path / "result")
    torch.manual_seed(0)
    model, state = RWKV(50, 32, 2), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for piece in (batch[:, :11], batch[:, 10:]):
        logits, state = model(piece[:, :-1], state)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten()).backward()
        optimizer.step()
        state = state.detach()
    assert not torch.equal(found["head.weight"], before["head.weight"])
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_lora_trains_decodes_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)
    made = _run("LoRA by peft")
    adapted, merged, tokens = made["adapted"], made["merged"], made["tokens"]
    adapters = peft.utils.load_peft_weights("adapter", device="cpu")
    # Both matrices of every linear layer of both mixings.
    assert len(adapters) == 2 * 7 * 2
    # B starts as zero and A as random, so both show that gradients came.
    moved = {name for name, x in adapters.items() if x.abs().max() > 0}
    assert len(moved) == len(adapters)
    assert type(merged) is RWKV and not any("lora" in name for name in merged.state_dict())
    assert adapted is not merged
    # Decoding went through the adapters: their merged weights, in parallel, give the same tokens.
    output = made["generated"]
    with torch.no_grad():
        logits, _ = merged(output[:, :-1])
        best = logits[:, 4:].gather(2, output[:, 5:, None]).squeeze(2)
        torch.testing.assert_close(best, logits[:, 4:].amax(2), rtol=1e-4, atol=1e-4)
    merged.save_pretrained("merged.pth")
    loaded = RWKV.from_pretrained("merged.pth")
    assert torch.equal(loaded(tokens)[0], merged(tokens)[0])


def test_an_adapter_changes_what_is_decoded_token_by_token() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model, tokens = randomised(RWKV(50, 32, 2)), torch.randint(50, (2, 6))
    config = peft.LoraConfig(r=4, target_modules=["key", "value", "receptance", "output"], init_lora_weights=False)
    with torch.no_grad():
        plain, _ = model(tokens)
        adapted = peft.get_peft_model(model, config)
        expected, _ = adapted(tokens)
        state = adapted.empty_state(2)
        found = torch.stack([adapted.step(token, state) for token in tokens.unbind(1)], 1)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(tokens)[0], plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1
