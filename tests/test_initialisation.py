"""The origin of a model's initial values, for any device and dtype that it is made in."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.nn import RWKV

V, C, L = 23, 16, 3


@pytest.mark.parametrize("children_first", [False, True])
def test_a_model_made_on_the_meta_device_gets_the_initial_values_of_a_fresh_one(children_first: bool) -> None:
    """By the protocol of torch's own layers, each resetting what it owns, so in any order."""
    torch.manual_seed(0)
    fresh = RWKV(V, C, L)
    with torch.device("meta"):
        model = RWKV(V, C, L)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    modules = list(model.modules())
    torch.manual_seed(0)
    for module in reversed(modules) if children_first else modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert list(model.state_dict()) == list(fresh.state_dict())
    for name, expected in fresh.state_dict().items():
        found = model.state_dict()[name]
        if not children_first:
            assert torch.equal(found, expected), name
        # In another order, other random numbers: of the same scale.
        torch.testing.assert_close(found.std(correction=0), expected.std(correction=0), rtol=0.2, atol=1e-6, msg=name)
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=0.2, atol=0.1, msg=name)


def test_resetting_a_trained_model_leaves_nothing_of_it() -> None:
    torch.manual_seed(0)
    model = RWKV(V, C, L)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.normal_()
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_every_module_with_parameters_of_its_own_can_reset_them() -> None:
    for name, module in RWKV(V, C, L).named_modules():
        assert not list(module.parameters(recurse=False)) or hasattr(module, "reset_parameters"), name


def test_random_matrices_are_orthogonal_of_their_published_scale() -> None:
    model = RWKV(V, C, L)
    block = model.blocks[1]
    assert isinstance(block.att.value, nn.Linear)
    for matrix, gain in [
        (block.att.value.weight, 1.0),
        (block.ffn.key.weight, 2.0),
        (model.head.weight, 0.5 * (V / C) ** 0.5),
    ]:
        torch.testing.assert_close(matrix.T @ matrix, gain**2 * torch.eye(C), rtol=1e-5, atol=1e-5)


def test_layers_are_of_torchs_own_types_and_copies_reset_themselves() -> None:
    """Quantisation and others know a layer by its exact type."""
    model = RWKV(V, C, L)
    assert {type(x) for x in model.modules() if isinstance(x, (nn.Linear, nn.Embedding))} == {nn.Linear, nn.Embedding}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        before = [x.clone() for x in model.parameters()]
        copied.blocks[0].att.key.weight.data.fill_(1)
        copied.blocks[0].att.key.reset_parameters()
        copied.head.reset_parameters()
        assert not copied.blocks[0].att.key.weight.any()
        assert not torch.equal(copied.head.weight, model.head.weight)
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


# ---- torch's default dtype ----


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_a_model_is_made_and_runs_in_the_default_dtype(default_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, tokens = RWKV(V, C, 2), torch.randint(V, (2, 5))
    assert {parameter.dtype for parameter in model.parameters()} == {default_dtype}
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    exact = RWKV(V, C, 2).state_dict()
    torch.set_default_dtype(default_dtype)
    for name, x in model.state_dict().items():
        # One rounding, of a result computed in float32 at least; uniform numbers are drawn in their own dtype.
        if name != "emb.weight" and not (name.endswith("weight") and default_dtype == torch.float64):
            torch.testing.assert_close(x.float(), exact[name].to(default_dtype).float(), rtol=1e-6, atol=1e-6, msg=name)
    logits, state = model(tokens)
    assert logits.dtype == default_dtype and logits.isfinite().all()
    logits.sum().backward()
    assert model.blocks[0].att.time_decay.grad is not None
    assert state.wkv.dtype == (torch.float64 if default_dtype == torch.float64 else torch.float32)
    output = model.generate(tokens, 3, attention_mask=torch.ones(2, 5).int(), top_p=0.9)
    assert list(output.shape) == [2, 8]


def test_the_operator_does_not_depend_on_the_default_dtype(default_dtype: torch.dtype, backend: str) -> None:
    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.set_default_dtype(dtype)
        draw = torch.Generator().manual_seed(0)
        w, u, *kv = (
            torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(torch.get_default_device())
            for shape in ([4], [4], [2, 9, 4], [2, 9, 4])
        )
        leaves = [x.requires_grad_() for x in (w, u, *kv)]
        y, state = rwkv_kernels.wkv(*leaves, rwkv_kernels.empty_state(2, 4), return_state=True, backend=backend)
        gradients = torch.autograd.grad(y.sum(), leaves)
        with torch.no_grad():
            after = state.detach().clone()
            stepped = rwkv_kernels.wkv_step(w, u, kv[0][:, 0], kv[1][:, 0], after, r=kv[1][:, 1], backend=backend)
            without_state = rwkv_kernels.wkv(w, u, *kv, backend=backend)
        return [y, state, *gradients, after, stepped, without_state, reference.wkv_direct(w, u, *kv)]

    for found, expected in zip(run(default_dtype), run(torch.float32), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
