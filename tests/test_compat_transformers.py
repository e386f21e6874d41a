"""transformers' own RWKV with the patch, against an independent float64 computation."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import model_oracle
import pytest
import torch
import transformers_models
from problems import assert_tensor_close
from torch import Tensor
from torch.nn import functional as F

import rwkv_kernels
from rwkv_kernels.compat import transformers as compat

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")

T = 11
# Two float64 computations of three layers with a few hundred roundings each.
CLOSE = 1e-11


@pytest.fixture
def patched(native_backend: str) -> Iterator[None]:
    """The patch, on every device that the operators have kernels for."""
    with rwkv_kernels.use_backend(native_backend), compat.patched():
        yield


def _plain_state(state: list[Tensor]) -> list[model_oracle.PlainState]:
    """The five [B, C, L] tensors, ffn, att, num, den and max, as sums."""
    return [
        model_oracle.PlainState(att, ffn, num * top.exp(), den * top.exp())
        for ffn, att, num, den, top in zip(*(x.unbind(2) for x in state), strict=True)
    ]


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _given_state(model: Any, batch: int) -> list[Tensor]:
    """Another sequence's state, as leaves."""
    with torch.no_grad():
        state = model(transformers_models.tokens(batch, 5).flip(1), use_cache=True).state
    return [x.detach().clone().requires_grad_() for x in state]


@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no_cache", "cache"])
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_loss_state_and_every_gradient_are_exact(
    batch: int, use_cache: bool, with_state: bool, patched: None
) -> None:
    model, tokens = transformers_models.make(), transformers_models.tokens(batch, T)
    state = _given_state(model, batch) if with_state else None
    output = model(tokens, labels=tokens, state=state, use_cache=use_cache)

    weights = transformers_models.weights(model)
    exact_state = None if state is None else [x.detach().clone().requires_grad_() for x in state]
    logits, after = model_oracle.run(weights, tokens, None if exact_state is None else _plain_state(exact_state))
    loss = _loss(logits, tokens)
    assert_tensor_close("logits", output.logits, logits, CLOSE)
    # transformers computes the loss of float64 logits in float32, so gradients are taken of the same loss in float64.
    assert_tensor_close("loss", output.loss, loss, 4 * torch.finfo(torch.float32).eps)
    total, exact_total = _loss(output.logits, tokens), loss

    # The next call's output from the state counts in the loss, so that gradients come through it, too.
    if use_cache or with_state:
        for found, exact in zip(_plain_state(output.state), after, strict=True):
            for name, x, y in zip(exact._fields, found, exact, strict=True):
                assert_tensor_close(name, x, y, CLOSE)
                total, exact_total = total + x.square().sum(), exact_total + y.square().sum()

    total.backward()
    exact_total.backward()
    for name, parameter in model.named_parameters():
        exact = weights[transformers_models.rwkv_lm_name(name)].grad
        assert exact is not None and exact.abs().max() > 0, name
        assert_tensor_close(name, parameter.grad, exact, CLOSE)
    if state is not None and exact_state is not None:
        for name, x, y in zip(["ffn", "att", "num", "den", "max"], state, exact_state, strict=True):
            assert_tensor_close(f"gradient of state {name}", x.grad, y.grad, CLOSE)


@pytest.mark.parametrize("cuts", [[4, 7], [1] * T, [10, 1]], ids=str)
def test_chunks_equal_the_whole_with_gradients(cuts: list[int], patched: None) -> None:
    model, tokens = transformers_models.make(), transformers_models.tokens(3, T)
    parameters = list(model.parameters())
    whole = model(tokens, use_cache=True)
    expected = torch.autograd.grad(whole.logits.square().sum(), parameters)
    state, pieces = None, []
    for piece in tokens.split(cuts, 1):
        output = model(piece, state=state, use_cache=True)
        state = output.state
        pieces.append(output.logits)
    logits = torch.cat(pieces, 1)
    assert_tensor_close("logits", logits, whole.logits, CLOSE)
    for (name, _), x, y in zip(
        model.named_parameters(), torch.autograd.grad(logits.square().sum(), parameters), expected, strict=True
    ):
        assert_tensor_close(name, x, y, CLOSE)


def _packed(*lengths: int) -> tuple[Tensor, Tensor]:
    """Tokens of several sequences in one row, and their boundaries."""
    tokens = transformers_models.tokens(1, sum(lengths))
    ends = torch.tensor([0, *lengths], device=tokens.device).cumsum(0)
    return tokens, ends.to(torch.int32)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
def test_packed_sequences_give_what_each_gives_alone(with_state: bool, checkpointing: bool, patched: None) -> None:
    model, lengths = transformers_models.make(), (4, 0, 1, 6)
    tokens, boundaries = _packed(*lengths)
    labels = tokens.clone()
    labels[0, boundaries[:-1][torch.tensor(lengths) > 0].long()] = -100
    state = _given_state(model, len(lengths)) if with_state else None
    wanted = [*model.parameters(), *(state or ())]

    total, count, pieces, ends = 0.0, 0, [], []
    for n, piece in enumerate(tokens.split(lengths, 1)):
        own = None if state is None else [x[n : n + 1] for x in state]
        if piece.shape[1] == 0:
            ends.append(own)
            continue
        alone = model(piece, state=own)
        pieces.append(alone.logits)
        ends.append(alone.state)
        total = total + F.cross_entropy(alone.logits[0, :-1], piece[0, 1:], reduction="sum")
        count += piece.shape[1] - 1
    expected = torch.autograd.grad(total / count, wanted)

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(tokens, state=state, labels=labels, cu_seq_lens_q=boundaries)
    assert_tensor_close("logits", output.logits, torch.cat(pieces, 1), CLOSE)
    assert_tensor_close("loss", output.loss, total / count, 4 * torch.finfo(torch.float32).eps)
    found = torch.autograd.grad(_loss(output.logits, labels), wanted)
    for x, y in zip(found, expected, strict=True):
        assert_tensor_close("gradient", x, y, CLOSE)
    assert (output.state is None) == (state is None) == ("state" not in output)
    if state is not None:
        assert [x.shape for x in output.state] == [x.shape for x in state]
        for n, end in enumerate(ends):
            exact = _plain_state(end)
            for x, y in zip(_plain_state([part[n : n + 1] for part in output.state]), exact, strict=True):
                for name, ours, theirs in zip(x._fields, x, y, strict=True):
                    assert_tensor_close(name, ours, theirs, CLOSE)


def test_both_models_take_boundaries_with_a_cache_or_in_a_tuple(patched: None) -> None:
    model, (tokens, boundaries) = transformers_models.make(torch.float32), _packed(4, 7)
    expected = model.rwkv(tokens, cu_seq_lens_q=boundaries, use_cache=True)
    assert [list(x.shape[::2]) for x in expected.state] == [[2, 3]] * 5
    assert torch.equal(model(tokens, cu_seq_lens_q=boundaries).logits, model.head(expected.last_hidden_state))
    in_a_tuple = model.rwkv(inputs_embeds=model.rwkv.embeddings(tokens), cu_seq_lens_q=boundaries, return_dict=False)
    assert len(in_a_tuple) == 1 and torch.equal(in_a_tuple[0], expected.last_hidden_state)
    resumed = model(tokens, cu_seq_lens_q=boundaries, state=expected.state)
    twice = model(torch.cat((tokens[:, :4], tokens[:, :4]), 1)).logits[:, 4:]
    assert_tensor_close("resumed", resumed.logits[:, :4], twice, 1e-5)


def test_the_batch_of_the_flattening_collator_is_taken_as_it_is() -> None:
    model, (tokens, boundaries) = transformers_models.make(), _packed(4, 7)
    rows = [{"input_ids": row.tolist()} for row in tokens[0].split([4, 7])]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(rows)
    with compat.patched():
        output = model(**batch)
        assert torch.equal(output.logits, model(tokens, cu_seq_lens_q=boundaries).logits)
        expected = torch.cat([model(row[None]).logits for row in tokens[0].split([4, 7])], 1)
    assert_tensor_close("logits", output.logits, expected, CLOSE)
    assert_tensor_close("loss", output.loss, _loss(expected, batch["labels"]), 4 * torch.finfo(torch.float32).eps)


def test_boundaries_that_do_not_fit_are_refused(patched: None) -> None:
    model, (tokens, boundaries) = transformers_models.make(), _packed(4, 7)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected input_ids \[1, total\] .* got \[2, 11\]"):
        model(tokens.expand(2, -1), cu_seq_lens_q=boundaries)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected a tensor \[N \+ 1\], got list"):
        model(tokens, cu_seq_lens_q=[0, 4, 11])
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected a tensor \[N \+ 1\], got \[1, 3\]"):
        model(tokens, cu_seq_lens_q=boundaries[None])
    with pytest.raises(ValueError, match=r"five tensors \[B, C, L\] with B, L = 2, 3"):
        model(tokens, cu_seq_lens_q=boundaries, state=_given_state(model, 1))


def test_gradient_checkpointing_reads_the_state_that_was_passed(patched: None) -> None:
    model, tokens = transformers_models.make(), transformers_models.tokens(2, T)
    state = _given_state(model, 2)
    wanted = [*model.parameters(), *state]
    expected = torch.autograd.grad(model(tokens, state=state).logits.square().sum(), wanted)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.autograd.grad(model(tokens, state=state).logits.square().sum(), wanted)
    for x, y in zip(found, expected, strict=True):
        assert_tensor_close("gradient", x, y, CLOSE)


def test_backward_works_after_eval_with_a_cache() -> None:
    model, tokens = transformers_models.make().eval(), transformers_models.tokens(2, T)
    with compat.patched():
        model(tokens).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_state_that_was_passed_is_not_modified(patched: None) -> None:
    model, tokens = transformers_models.make().eval(), transformers_models.tokens(2, T)
    state = [x.detach() for x in _given_state(model, 2)]
    before = [x.clone() for x in state]
    model(tokens, state=state)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"rescale_every": 2}], ids=["plain", "rescaled"])
def test_equals_the_original_where_the_original_is_right(dtype: torch.dtype, settings: dict[str, int]) -> None:
    model, tokens = transformers_models.make(dtype, **settings).eval(), transformers_models.tokens(3, T)
    with torch.no_grad():
        original = model(tokens)
        with compat.patched():
            found = model(tokens)
            in_a_tuple = model(tokens, return_dict=False)
    # One rounding of an output of each layer, at random, moves the logits by no more than some of its units.
    allowed = 40 * torch.finfo(dtype).eps
    assert found.logits.dtype == original.logits.dtype
    assert_tensor_close("logits", found.logits, original.logits, allowed)
    assert torch.equal(in_a_tuple[0], found.logits)
    for x, y, z in zip(found.state, original.state, in_a_tuple[1], strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.equal(x, z)
    for x, y in zip(_plain_state(found.state), _plain_state(original.state), strict=True):
        for name, ours, theirs in zip(x._fields, x, y, strict=True):
            assert_tensor_close(name, ours, theirs, allowed)


class _LowRank(torch.nn.Module):
    """A linear layer and a low-rank addition to it, whose weight attribute is the layer's, as in peft."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down, self.up = torch.nn.Linear(base.in_features, 2), torch.nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_lora_in_eval_mode_needs_rescale_every_zero(patched: None) -> None:
    tokens = transformers_models.tokens(2, T)
    for rescale_every in (0, 1):
        model = transformers_models.make(rescale_every=rescale_every)
        for block in model.rwkv.blocks:
            block.attention.output = _LowRank(block.attention.output).double()
        difference = (model.eval()(tokens).logits - model.train()(tokens).logits).abs().max()
        assert difference < CLOSE if rescale_every == 0 else difference > 0.01


def _generate(model: Any, tokens: Tensor, **settings: Any) -> Tensor:
    torch.manual_seed(3)
    mask = torch.ones_like(tokens)
    output = model.generate(tokens, attention_mask=mask, max_new_tokens=20, pad_token_id=0, **settings)
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "top_p": 0.8, "temperature": 1.3}], ids=["greedy", "sampled"]
)
def test_generate_gives_the_same_tokens_as_the_original(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = transformers_models.make(torch.float32).eval(), transformers_models.tokens(1, 4)
    original = _generate(model, tokens, **settings)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the original's loop was called")

    monkeypatch.setattr(modeling, "rwkv_linear_attention_cpu", fail)
    with compat.patched():
        assert torch.equal(_generate(model, tokens, **settings), original)


def test_generate_for_several_sequences_equals_each_alone() -> None:
    model, tokens = transformers_models.make(eos_token_id=None).eval(), transformers_models.tokens(3, 4)
    alone = torch.cat([_generate(model, row, do_sample=False) for row in tokens.split(1)])
    with compat.patched():
        assert torch.equal(_generate(model, tokens, do_sample=False), alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams=3: .* cannot use beam search with a cache.*use_cache=False gives the right"),
        ({"num_beams": 3, "do_sample": True}, "num_beams=3: .* cannot use beam search with a cache"),
        ({"guidance_scale": 2.0}, r"guidance_scale=2.0: .* cannot use guidance with a cache.*use_cache=False gives"),
    ],
    ids=["beams", "sampled beams", "guidance"],
)
def test_generate_refuses_with_a_cache_what_is_right_only_without(settings: dict[str, Any], message: str) -> None:
    model, tokens = transformers_models.make(eos_token_id=None).eval(), transformers_models.tokens(2, 4)
    settings = {"do_sample": False} | settings
    right = _generate(model, tokens, use_cache=False, **settings)
    with compat.patched():
        assert torch.equal(_generate(model, tokens, use_cache=False, **settings), right)
        with pytest.raises(ValueError, match=message):
            _generate(model, tokens, **settings)


@pytest.mark.parametrize("prompt", [1, 4])
def test_generate_continues_a_state_or_refuses_to(prompt: int) -> None:
    model, tokens = transformers_models.make(eos_token_id=None).eval(), transformers_models.tokens(2, 9)
    with compat.patched(), torch.no_grad():
        whole = _generate(model, tokens, do_sample=False)
        settings = {"do_sample": False, "state": model(tokens[:, :-prompt], use_cache=True).state}
        with pytest.raises(ValueError, match="state: .* cannot continue a state with use_cache=False"):
            _generate(model, tokens[:, -prompt:], use_cache=False, **settings)
        if prompt > 1 and "prepare_inputs_for_generation" in vars(modeling.RwkvForCausalLM):
            with pytest.raises(ValueError, match="state: .* reads the last of the 4 tokens alone; pass that one, with"):
                _generate(model, tokens[:, -prompt:], **settings)
        else:
            assert torch.equal(_generate(model, tokens[:, -prompt:], **settings), whole[:, 9 - prompt :])


# ---- patch and unpatch ----


def _in_place() -> list[Any]:
    names = ["_prepare_cache_for_generation", "prepare_inputs_for_generation"]
    generation = [vars(modeling.RwkvForCausalLM).get(name) for name in names]
    layers = [modeling.RwkvSelfAttention, modeling.RwkvFeedForward]
    forwards = [owner.forward for owner in (modeling.RwkvModel, modeling.RwkvForCausalLM, *layers)]
    return [modeling.rwkv_linear_attention, modeling.load_wkv_cuda_kernel, *forwards, *generation]


def test_unpatch_restores_what_was_there() -> None:
    original = _in_place()
    compat.unpatch()
    with compat.patched():
        assert not any(x is y for x, y in zip(_in_place()[:7], original[:7], strict=True))
        replaced = _in_place()
        compat.patch()
        with compat.patched():
            assert _in_place() == replaced
        assert _in_place() == replaced
    assert _in_place() == original
    with pytest.raises(ZeroDivisionError), compat.patched():
        raise ZeroDivisionError
    assert _in_place() == original


def test_the_originals_own_kernel_is_neither_loaded_nor_used(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(modeling, "is_ninja_available", lambda: True)
    monkeypatch.setattr(modeling, "is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(modeling, "load_wkv_cuda_kernel", loaded.append)
    transformers_models.make()
    assert loaded
    loaded.clear()
    with compat.patched():
        model = transformers_models.make()
        assert not loaded
        expected = model(transformers_models.tokens(2, T)).logits
        monkeypatch.setattr(modeling, "rwkv_cuda_kernel", types.SimpleNamespace(max_seq_length=1))
        assert torch.equal(model(transformers_models.tokens(2, T)).logits, expected)


def test_a_transformers_without_rwkv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.rwkv.modeling_rwkv", None)
    with pytest.raises(ImportError, match=rf"transformers {transformers.__version__} has no RWKV .*use 4.57"):
        compat.patch()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'rwkv_kernels\[transformers\]'"):
        compat.patch()


def test_changed_internals_are_named_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None: ...

    def forward(self: Any, hidden: Tensor, state: Any = None, use_cache: bool = False) -> None: ...

    original = modeling.RwkvModel.forward
    monkeypatch.setattr(modeling, "rwkv_linear_attention", other)
    with pytest.raises(RuntimeError, match=r"rwkv_linear_attention has the parameters \['w', 'u', 'k', 'v'\]"):
        compat.patch()
    monkeypatch.undo()
    monkeypatch.setattr(modeling.RwkvSelfAttention, "forward", forward)
    with pytest.raises(RuntimeError, match=r"does not call rwkv_linear_attention.*Nothing was changed"):
        compat.patch()
    monkeypatch.undo()
    monkeypatch.delattr(modeling, "rwkv_linear_attention")
    with pytest.raises(RuntimeError, match="rwkv_linear_attention is missing"):
        compat.patch()
    assert modeling.RwkvModel.forward is original


def test_arguments_that_the_patch_does_not_know_are_passed_on() -> None:
    seen: dict[str, Any] = {}

    def forward(
        self: Any, input_ids: Any, inputs_embeds: Any = None, state: Any = None, use_cache: Any = None, **others: Any
    ) -> Any:
        seen.update(others)
        return (inputs_embeds, state)

    model = transformers_models.make().rwkv
    x, state = compat._keep_state_apart(forward)(model, transformers_models.tokens(2, T), use_cache=True, other=1)
    assert seen == {"other": 1}
    assert list(x.shape) == [2, T, transformers_models.C] and len(state) == 5


def test_another_way_of_indexing_the_state_is_refused() -> None:
    columns = compat._Columns(torch.zeros(2, 4, 3))
    for index in (0, (slice(None), 1, 2), (slice(None), slice(0, 1), 2)):
        with pytest.raises(RuntimeError, match=r"indexes its state with .* knows only \[:, :, layer\]"):
            columns[index]


# ---- the function and its state ----


def test_the_function_returns_a_state_only_when_it_is_requested_or_given() -> None:
    w, u = torch.randn(2, 6)
    k, v = torch.randn(2, 2, 5, 6)
    output, state = compat.rwkv_linear_attention(w, u, k, v)
    assert state is None
    same, state = compat.rwkv_linear_attention(w, u, k, v, return_state=True)
    assert torch.equal(output, same) and state is not None
    expected, exact = modeling.rwkv_linear_attention_cpu(w, u, k, v, state)
    found, after = compat.rwkv_linear_attention(w, u, k, v, state)
    assert_tensor_close("output", found, expected, 1e-5)
    assert after is not None
    assert_tensor_close("num/den", after[0] / after[1], exact[0] / exact[1], 1e-5)
    assert_tensor_close("log den", after[2] + after[1].log(), exact[2] + exact[1].log(), 1e-5)


def test_states_of_other_layouts_are_refused_with_the_converter_to_use(patched: None) -> None:
    model, tokens = transformers_models.make(), transformers_models.tokens(2, T)
    five = model(tokens, use_cache=True).state
    with pytest.raises(ValueError, match=r"expected \[num, den, max\], got 5 tensors.*import_model_state"):
        compat.import_state(five)
    message = r"five tensors \[B, C, L\] with B, L = 2, 3 .*, got {} of shapes .*export_model_state converts"
    with pytest.raises(ValueError, match=message.format("list")):
        model(tokens, state=five[2:])
    with pytest.raises(ValueError, match=message.format("list")):
        model(tokens, state=[x.movedim(2, 0) for x in five])
    with pytest.raises(ValueError, match=message.format("RWKVState")):
        model(tokens, state=compat.import_model_state(five))
