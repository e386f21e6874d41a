"""A padded batch is its sequences run alone: logits, states and gradients."""

import pytest
import torch
from models import V, rwkv
from problems import assert_tensor_close, widest_dtype
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.nn import RWKV, RWKVState

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


def _state(model: RWKV, batch: int) -> RWKVState:
    """Every sequence another one, as leaves."""
    tokens = torch.randint(V, (batch, 7), generator=torch.Generator().manual_seed(2), device="cpu")
    with torch.no_grad():
        _, state = model(tokens.to(torch.get_default_device()))
    return RWKVState(*(x.requires_grad_() for x in state))


def _loss(logits: Tensor, state: RWKVState) -> Tensor:
    """A loss that depends on every logit and on the state up to its gauge."""
    num, den, top = state.wkv.unbind(-2)
    log_den = torch.where(den > 0, top + den.clamp(min=1e-30).log(), 0)
    mean = torch.where(den > 0, num / den.clamp(min=1e-30), 0)
    return sum(x.sin().sum() for x in (3 * logits, state.att_shift, state.ffn_shift, mean, log_den))  # type: ignore[return-value]


@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("name", MASKS)
def test_padded_sequences_give_what_each_gives_alone(name: str, with_state: bool, compiled_backend: str) -> None:
    dtype = widest_dtype(compiled_backend)
    close = ROUNDINGS * torch.finfo(dtype).eps
    model, (tokens, mask) = rwkv(dtype), _batch(MASKS[name])
    parameters = dict(model.named_parameters())
    B = len(tokens)
    state = _state(model, B) if with_state else None
    leaves = [*parameters.values(), *(state or ())]
    with rwkv_kernels.use_backend(compiled_backend):
        logits, after = model(tokens, state, mask)
        found = torch.autograd.grad(_loss(logits, after), leaves, materialize_grads=True)

        total, pieces = torch.zeros((), dtype=dtype), []
        for b in range(B):
            alone_state = None if state is None else state.take([b])
            alone, alone_after = model(tokens[b : b + 1, mask[b].bool()], alone_state)
            total = total + _loss(alone, alone_after)
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
        (gradient,) = torch.autograd.grad(_loss(logits, state) + logits.sum(), [model.emb.weight])
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
    state = _state(model, 2)
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
