"""Packed sequences are each run alone: logits, states and gradients, whatever the lengths, in one graph."""

import functools
from typing import Any

import pytest
import torch
from models import C, V, leaf_state, loss_up_to_gauge, rwkv
from problems import assert_tensor_close, widest_dtype
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import rwkv_kernels
from rwkv_kernels.nn import Block, ChannelMix, Packing, RWKVState, TimeMix, cu_seqlens_of

# Two ways through three layers differ by some hundred roundings, of the largest element.
ROUNDINGS = 1000

LENGTHS = {
    "several": (4, 9, 2),
    "one": (7,),
    # Single tokens alone depend neither on the bonus nor on the decay, whose gradients would be roundings of zero.
    "single_tokens": (1, 1, 2, 1),
    "empty_between": (0, 3, 0, 0, 5, 1, 0),
    "nothing": (0, 0),
}
MIXED = LENGTHS["empty_between"]


def _packed(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens and boundaries, on torch's default device."""
    tokens = torch.randint(V, (1, sum(lengths)), generator=torch.Generator().manual_seed(1), device="cpu")
    return tokens.to(torch.get_default_device()), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _assert_close(found: Any, expected: Any, allowed: float) -> None:
    """Tensors in the same order in both."""
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True)
    for place, (x, y) in enumerate(pairs):
        assert_tensor_close(f"{place}", x, y, allowed, least=1e-3)


@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_sequences_give_what_each_gives_alone(name: str, with_state: bool, compiled_backend: str) -> None:
    dtype, lengths = widest_dtype(compiled_backend), LENGTHS[name]
    model, (tokens, boundaries) = rwkv(dtype), _packed(lengths)
    N = len(lengths)
    state = leaf_state(model, N) if with_state else None
    leaves = [*model.parameters(), *(state or ())]
    with rwkv_kernels.use_backend(compiled_backend):
        logits, after = model(tokens, state, cu_seqlens=boundaries)
        last, last_after = model(tokens, state, cu_seqlens=boundaries, last_only=True)
        found = torch.autograd.grad(loss_up_to_gauge(logits, after), leaves, materialize_grads=True)
        alone = [
            model(piece, None if state is None else state.take([n])) for n, piece in enumerate(tokens.split(lengths, 1))
        ]
        expected_logits = torch.cat([piece for piece, _ in alone], 1)
        expected_after = RWKVState.cat([end for _, end in alone])
        loss = loss_up_to_gauge(expected_logits, expected_after)
        expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    close = ROUNDINGS * torch.finfo(dtype).eps
    _assert_close((logits, after, found), (expected_logits, expected_after, expected), close)
    assert list(last.shape) == [N, 1, V]
    ends = [piece[0, -1:] if piece.shape[1] else torch.zeros(1, V, dtype=dtype) for piece, _ in alone]
    _assert_close((last, last_after), (torch.stack(ends), after), close)


def test_sequences_are_cut_and_resumed_packed() -> None:
    model, (tokens, boundaries) = rwkv(), _packed((6, 0, 9, 2))
    whole, end = model(tokens, cu_seqlens=boundaries)
    state, cuts = None, [(2, 0, 0, 1), (0, 0, 8, 0), (4, 0, 1, 1)]
    done = torch.zeros(4, dtype=torch.int64)
    for lengths in cuts:
        places = torch.cat([boundaries[n] + done[n] + torch.arange(length) for n, length in enumerate(lengths)])
        pieces = torch.tensor([0, *lengths]).cumsum(0)
        logits, state = model(tokens[:, places], state, cu_seqlens=pieces)
        _assert_close(logits, whole[:, places], 1e-12)
        done += torch.tensor(lengths)
    _assert_close(state, end, 1e-12)


def test_a_sequence_without_tokens_hands_on_all_of_its_state() -> None:
    model, (tokens, boundaries) = rwkv(torch.float32), _packed(MIXED)
    state = leaf_state(model, len(MIXED))
    _, after = model(tokens, state, cu_seqlens=boundaries)
    empty = [n for n, length in enumerate(MIXED) if length == 0]
    for given, handed, moved in zip(state, after.take(empty), after, strict=True):
        assert torch.equal(handed, given[:, empty])
        assert not torch.equal(moved, given)


def test_layers_take_a_packing() -> None:
    block, lengths = rwkv(layers=1).blocks[0], (3, 0, 5)
    assert isinstance(block, Block) and isinstance(block.att, TimeMix) and isinstance(block.ffn, ChannelMix)
    x, (_, boundaries) = torch.randn(1, 8, C, dtype=torch.float64), _packed(lengths)
    packing = Packing.of(boundaries, 8)
    shift, state = torch.randn(3, C, dtype=torch.float64), rwkv_kernels.empty_state(3, C, dtype=torch.float64)
    calls: list[tuple[Any, Any]] = [
        (block, [RWKVState(shift, shift + 1, state)]),
        (block.att, [shift, state]),
        (block.ffn, [shift]),
        (block, []),
        (block.att, []),
        (block.ffn, []),
    ]
    for module, given in calls:
        y, *after = module(x, *given, packing=packing)
        alone = [
            module(piece, *torch.utils._pytree.tree_map(lambda part, n=n: part[n : n + 1], given))
            for n, piece in enumerate(x.split(lengths, 1))
        ]
        outputs, *ends = zip(*alone, strict=True)
        joined = torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *zip(*ends, strict=True))
        _assert_close((y, after), (torch.cat(outputs, 1), joined), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_are_packed_as_exactly(dtype: torch.dtype) -> None:
    model, (tokens, boundaries) = rwkv(dtype), _packed(MIXED)
    logits, state = model(tokens, cu_seqlens=boundaries)
    assert (logits.dtype, state.att_shift.dtype, state.wkv.dtype) == (dtype, dtype, torch.float32)
    alone = torch.cat([model(piece)[0] for piece in tokens.split(MIXED, 1)], 1)
    assert_tensor_close("logits", logits, alone, 40 * torch.finfo(dtype).eps)


def test_autocast_packs_in_bfloat16_close_to_float32() -> None:
    model, (tokens, boundaries) = rwkv(torch.float32), _packed(MIXED)
    expected, _ = model(tokens, cu_seqlens=boundaries)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits, state = model(tokens, cu_seqlens=boundaries)
        resumed, _ = model(tokens, state, cu_seqlens=boundaries)
    assert resumed.dtype == logits.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32
    assert_tensor_close("logits", logits, expected, 5e-2)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model, (tokens, boundaries) = rwkv(layers=2), _packed(MIXED)
    state = leaf_state(model, len(MIXED))
    wanted = [*model.parameters(), *state]
    expected = torch.autograd.grad(loss_up_to_gauge(*model(tokens, state, cu_seqlens=boundaries)), wanted)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    found = torch.autograd.grad(loss_up_to_gauge(*model(tokens, state, cu_seqlens=boundaries)), wanted)
    _assert_close(found, expected, 1e-12)


def test_embeddings_are_packed_as_their_tokens() -> None:
    model, (tokens, boundaries) = rwkv(), _packed(MIXED)
    expected = model(tokens, cu_seqlens=boundaries)
    found = model(inputs_embeds=model.emb(tokens), cu_seqlens=boundaries.long())
    _assert_close(found, expected, 0)


# ---- shapes alone decide ----


def test_lengths_and_numbers_of_sequences_share_one_graph() -> None:
    model = rwkv(torch.float32, layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    parameters, graphs = list(model.parameters()), set()
    for lengths in ((3, 2, 4, 0), MIXED, (2, 9), (1,) * 12):
        tokens, boundaries = _packed(lengths)
        state = leaf_state(model, len(lengths))
        found, expected = (call(tokens, state, cu_seqlens=boundaries) for call in (compiled, model))
        gradients = [torch.autograd.grad(loss_up_to_gauge(*out), parameters) for out in (found, expected)]
        _assert_close((found, gradients[0]), (expected, gradients[1]), 1e-4)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_boundaries_are_not_read_on_the_host() -> None:
    """Tensors without numbers are enough."""
    model = rwkv(torch.float32).to("meta")
    tokens, boundaries = (torch.zeros(shape, dtype=torch.int64, device="meta") for shape in ((1, 9), (5,)))
    for state in (None, model.empty_state(4)):
        for last_only, shape in ((False, [1, 9, V]), (True, [4, 1, V])):
            logits, after = model(tokens, state, cu_seqlens=boundaries, last_only=last_only)
            assert list(logits.shape) == shape and after.wkv.shape == model.empty_state(4).wkv.shape


def test_a_mixing_keeps_for_backward_what_the_formulas_need() -> None:
    """The token and its predecessor, their three mixes, r, k, v and the gated output: no output without its gate."""
    layer, kept = TimeMix(C, 0, 2), {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    x = torch.randn(2, 64, C, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(x)
    assert len([storage for storage in kept.values() if storage.nbytes() >= x.nbytes]) == 9


# ---- boundaries from what comes with a batch ----


def test_boundaries_come_from_what_the_flattening_collator_gives() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    features = [{"input_ids": list(range(length))} for length in (3, 1, 1, 5)]
    expected = torch.tensor([0, 3, 4, 5, 10], dtype=torch.int32)
    for settings in ({}, {"return_flash_attn_kwargs": True}, {"return_position_ids": False, "return_seq_idx": True}):
        batch = transformers.DataCollatorWithFlattening(**settings)(features, return_tensors="pt")
        found = cu_seqlens_of(batch)
        assert found.dtype == torch.int32 and torch.equal(found, expected)


def test_boundaries_are_where_positions_restart_or_numbers_change() -> None:
    given = torch.tensor([0, 0, 3])
    positions, numbers = torch.tensor([[2, 3, 2, 2, 3, 4]]), torch.tensor([[7, 7, 2, 2, 2, 7]])
    assert cu_seqlens_of({"position_ids": positions}).tolist() == [0, 2, 3, 6]
    assert cu_seqlens_of({"position_ids": positions, "seq_idx": numbers}).tolist() == [0, 2, 5, 6]
    assert cu_seqlens_of({"position_ids": positions, "seq_idx": numbers, "cu_seq_lens_q": given}) is given
    assert cu_seqlens_of({"position_ids": positions[:, :1]}).tolist() == [0, 1]
    assert cu_seqlens_of({"position_ids": positions[:, :0]}).tolist() == [0, 0]


def test_a_batch_without_boundaries_is_named() -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_q, seq_idx or position_ids, .* got input_ids, labels"):
        cu_seqlens_of({"input_ids": torch.zeros(1, 3), "labels": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match=r"position_ids: expected shape \[1, total\], got \[2, 3\]"):
        cu_seqlens_of({"position_ids": torch.zeros(2, 3)})


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.ones(2, 5).long()}, ValueError, r"expected tokens \[1, total\] .* got \[2, 5\]"),
        ({"attention_mask": torch.ones(1, 5).long()}, ValueError, "either attention_mask or cu_seqlens, got both"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens: expected int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"cu_seqlens: expected shape \[N \+ 1\], got \[1, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 5], device="meta")}, ValueError, "cu_seqlens: expected device cpu as tokens"),
        ({"sequences": 1}, ValueError, r"state.att_shift: expected shape \[3, 2, 16\], got \[3, 1, 16\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens: expected to end at 5"),
        ({"cu_seqlens": torch.tensor([0, 9, 5])}, ValueError, "cu_seqlens: expected to rise, got 5 after 9"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens: expected to start at 0, got 1"),
    ],
    ids=["rows", "mask", "list", "floats", "matrix", "device", "state", "too_long", "falling", "late"],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = rwkv()
    arguments: dict[str, Any] = {"tokens": torch.ones(1, 5).long(), "cu_seqlens": torch.tensor([0, 2, 5])} | changes
    if sequences := arguments.pop("sequences", None):
        arguments["state"] = model.empty_state(sequences)
    with pytest.raises(error, match=message):
        model(**arguments)
