"""A padded batch is its sequences run alone: logits, states and gradients."""

import pytest
import torch
from models import V, leaf_state, loss_up_to_gauge, rwkv
from problems import assert_tensor_close, widest_dtype
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rwkv_kernels
from rwkv_kernels.nn import RWKVState

T = 9
# Two ways through three layers differ by some hundred roundings, of the largest element.
ROUNDINGS = 1000

# One row for each sequence, 1 for a token: left, right, both sides, a hole, everything, nothing, and one token.
MASKS = {
    "right": ["111111000", "111111111", "110000000"],
    "left": ["000111111", "000000011", "111111111"],
    "mixed": ["001111110", "110110111", "111111111", "000000000", "000010000", "011111100"],
    "equal": ["011111110", "111111100"],
    "nothing": ["000000000", "000000000"],
    "everything": ["111111111", "111111111"],
}


def _batch(rows: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens, with invalid ones in the padding, and the mask."""
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    tokens = torch.randint(V, mask.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(mask.device)
    return tokens.masked_fill(mask == 0, -100), mask


@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("name", MASKS)
def test_padded_sequences_give_what_each_gives_alone(name: str, with_state: bool, compiled_backend: str) -> None:
    dtype = widest_dtype(compiled_backend)
    close = ROUNDINGS * torch.finfo(dtype).eps
    model, (tokens, mask) = rwkv(dtype), _batch(MASKS[name])
    parameters = dict(model.named_parameters())
    B = len(tokens)
    state = leaf_state(model, B) if with_state else None
    leaves = [*parameters.values(), *(state or ())]
    with rwkv_kernels.use_backend(compiled_backend):
        logits, after = model(tokens, state, mask)
        found = torch.autograd.grad(loss_up_to_gauge(logits, after), leaves, materialize_grads=True)

        total, pieces = torch.zeros((), dtype=dtype), []
        for b in range(B):
            alone_state = None if state is None else state.take([b])
            alone, alone_after = model(tokens[b : b + 1, mask[b].bool()], alone_state)
            total = total + loss_up_to_gauge(alone, alone_after)
            assert_tensor_close(f"logits of {b}", logits[b, mask[b].bool()], alone[0], close)
            pieces.append(alone_after)
        expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    assert (logits[mask == 0] == 0).all()
    for field, x, y in zip(after._fields, after, RWKVState.cat(pieces), strict=True):
        assert_tensor_close(field, x, y, close)
    for key, x, y in zip([*parameters, *after._fields], found, expected, strict=False):
        assert_tensor_close(f"gradient of {key}", x, y, close, least=1e-3)


def test_padding_has_no_gradient_and_no_meaning() -> None:
    model, (tokens, mask) = rwkv(), _batch(MASKS["mixed"])
    results = []
    for filling in (0, 5, V + 3):
        logits, state = model(tokens.masked_fill(mask == 0, filling), attention_mask=mask.bool())
        (gradient,) = torch.autograd.grad(loss_up_to_gauge(logits, state) + logits.sum(), [model.emb.weight])
        results.append((logits, *state, gradient))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    unused = torch.ones(V, dtype=torch.bool).index_fill(0, tokens[mask == 1], False)
    assert unused.any()
    assert (results[0][-1][unused] == 0).all()


def test_a_mask_of_ones_changes_nothing() -> None:
    model, (tokens, mask) = rwkv(torch.float32), _batch(MASKS["everything"])
    expected, state = model(tokens)
    logits, after = model(tokens, attention_mask=mask)
    assert torch.equal(logits, expected)
    assert all(torch.equal(x, y) for x, y in zip(after, state, strict=True))


def test_no_steps_leave_everything_as_it_is() -> None:
    model = rwkv()
    state = leaf_state(model, 2)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    logits, after = model(empty, state, empty)
    assert list(logits.shape) == [2, 0, V]
    assert all(torch.equal(x, y) for x, y in zip(after, state, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_are_padded_as_exactly(dtype: torch.dtype) -> None:
    model, (tokens, mask) = rwkv(dtype), _batch(MASKS["mixed"])
    logits, _ = model(tokens, attention_mask=mask)
    assert logits.dtype == dtype
    for b in (0, 1, 2, 4, 5):
        alone, _ = model(tokens[b : b + 1, mask[b].bool()])
        assert_tensor_close(f"logits of {b}", logits[b, mask[b].bool()], alone[0], 40 * torch.finfo(dtype).eps)


def test_a_wrong_mask_is_named() -> None:
    model, (tokens, mask) = rwkv(), _batch(MASKS["right"])
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[3, 9\] as tokens, got \[3, 8\]"):
        model(tokens, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="attention_mask: expected booleans or integers, 0 for padding, got torch.fl"):
        model(tokens, attention_mask=mask.float())


def test_masks_and_sizes_share_one_graph() -> None:
    model = rwkv(torch.float32, layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    parameters, graphs = list(model.parameters()), set()
    for name in ("mixed", "right", "left", "equal"):
        tokens, mask = _batch(MASKS[name])
        tokens, mask = tokens.repeat(2, 1), mask.repeat(2, 1)  # a size of 3 would be that of a WKV state's dimension
        state = leaf_state(model, len(tokens))
        found, expected = compiled(tokens, state, mask), model(tokens, state, mask)
        gradients = [torch.autograd.grad(loss_up_to_gauge(*out), parameters) for out in (found, expected)]
        for x, y in zip((found[0], *found[1], *gradients[0]), (expected[0], *expected[1], *gradients[1]), strict=True):
            assert_tensor_close(name, x, y, 1e-4)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_a_mask_is_not_read_on_the_host() -> None:
    """Tensors without numbers are enough."""
    model = rwkv(torch.float32).to("meta")
    tokens = torch.zeros(2, T, dtype=torch.int64, device="meta")
    for state in (None, model.empty_state(2)):
        for last_only, steps in ((False, T), (True, 1)):
            logits, after = model(tokens, state, tokens.bool(), last_only=last_only)
            assert list(logits.shape) == [2, steps, V] and after.wkv.shape == model.empty_state(2).wkv.shape


def test_a_model_with_a_mask_is_exported_for_any_size() -> None:
    model = rwkv(torch.float32, layers=2)
    batch, steps = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=2, max=64)
    tokens, mask = _batch(MASKS["mixed"])
    state = leaf_state(model, len(tokens)).detach()
    shapes = ({0: batch, 1: steps}, RWKVState({1: batch}, {1: batch}, {1: batch}), {0: batch, 1: steps})  # type: ignore[arg-type]
    program = torch.export.export(model, (tokens, state, mask), dynamic_shapes=shapes).module()
    for rows in (["1110"], ["01", "00", "11"]):
        tokens, mask = _batch(rows)
        state = leaf_state(model, len(tokens)).detach()
        (found, found_state), (expected, expected_state) = program(tokens, state, mask), model(tokens, state, mask)
        for x, y in zip((found, *found_state), (expected, *expected_state), strict=True):
            assert_tensor_close(str(rows), x, y, 1e-5)
