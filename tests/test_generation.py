"""Serving: prompts of different length, stopping, seeds, streaming, and states that are kept and branched."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import C, V, rwkv
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.nn import RWKV, RWKVState

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])


def _tokens(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


SETTINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.8}]


@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
def test_prompts_of_different_length_go_on_as_each_alone(settings: dict[str, Any], with_state: bool) -> None:
    model, tokens = rwkv(), _tokens(3, 5)
    state = model(_tokens(3, 8).flip(1))[1] if with_state else None
    output = model.generate(
        tokens.masked_fill(MASK == 0, -1),
        12,
        attention_mask=MASK,
        state=state,
        generator=_generators(5, 6, 7),
        **settings,
    )
    assert list(output.shape) == [3, 17]
    for b in range(3):
        alone = model.generate(
            tokens[b : b + 1, MASK[b].bool()],
            12,
            state=None if state is None else state.take([b]),
            generator=_generators(5 + b),
            **settings,
        )
        assert torch.equal(output[b, 5:], alone[0, -12:])


def test_a_seed_decides_a_sequence_whatever_else_is_in_the_batch() -> None:
    model, tokens = rwkv(), _tokens(1, 4).expand(4, 4)
    output = model.generate(tokens, 15, generator=_generators(1, 2, 1, 3))
    assert torch.equal(output[0], output[2])
    assert not torch.equal(output[0], output[1]) and not torch.equal(output[1], output[3])


def test_streaming_gives_the_tokens_of_generate_one_by_one() -> None:
    model, tokens = rwkv(), _tokens(3, 5)
    expected = model.generate(tokens, 10, attention_mask=MASK, generator=_generators(1)[0])
    stream = model.stream(tokens, 10, attention_mask=MASK, generator=_generators(1)[0])
    assert isinstance(stream, Iterator)
    for position in range(5, 15):
        token = next(stream)
        assert torch.is_grad_enabled() and not token.requires_grad
        assert torch.equal(token, expected[:, position])
    assert next(stream, None) is None


MODES = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("begun", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_stream_is_read_in_other_modes_than_it_was_begun_in(begun: str, read: str, masked: bool) -> None:
    model, tokens = rwkv(), _tokens(3, 5)
    mask = MASK if masked else None
    expected = model.generate(tokens, 6, attention_mask=mask, generator=_generators(1)[0])[:, 5:]
    with MODES[begun]():
        stream = model.stream(tokens, 6, attention_mask=mask, generator=_generators(1)[0])
        found = [next(stream), next(stream)]
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert mode == (begun in ("none", "enable_grad"), begun == "inference")
    with MODES[read]():
        found += [next(stream), next(stream)]
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert mode == (read in ("none", "enable_grad"), read == "inference")
    with MODES[begun]():
        found += list(stream)
    assert torch.equal(torch.stack(found, 1), expected)
    assert not any(token.requires_grad or token.is_inference() for token in found)


def test_a_stream_takes_what_was_made_in_inference_mode() -> None:
    model, prefix, prompts = rwkv(), _tokens(3, 8), _tokens(3, 5)
    expected = model.generate(prompts, 6, state=model(prefix)[1], temperature=0)
    with torch.inference_mode():
        inside, tokens, state = rwkv(), prompts + 0, model(prefix)[1]
    for served in (inside, model):
        before = [x.clone() for x in state]
        assert torch.equal(served.generate(tokens, 6, state=state, temperature=0), expected)
        assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_a_stream_goes_on_in_and_out_of_autocast() -> None:
    torch.manual_seed(0)
    model, tokens = RWKV(V, C, 2), _tokens(2, 5)
    for begun, read in [(True, False), (False, True)]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=begun):
            stream = model.stream(tokens, 5)
            next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=read):
            assert len(list(stream)) == 4


def test_a_stream_computes_only_requested_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = rwkv(), []
    original = RWKV.step

    def counted(self: RWKV, tokens: Tensor, state: RWKVState) -> Tensor:
        steps.append(tokens)
        return original(self, tokens, state)

    monkeypatch.setattr(RWKV, "step", counted)
    stream = model.stream(_tokens(2, 3), 4)
    for asked in range(4):
        next(stream)
        assert len(steps) == asked
    assert next(stream, None) is None
    assert len(steps) == 3


def test_a_sequence_ends_with_its_stop_token_and_the_batch_with_the_last_sequence() -> None:
    model, tokens = rwkv(), _tokens(6, 4)
    free = model.generate(tokens, 60, generator=_generators(*range(6)))
    stop = [3, 7, 11]
    ends = []
    for row in free[:, 4:]:
        places = torch.isin(row, torch.tensor(stop)).nonzero()
        ends.append(int(places[0]) if len(places) else 59)
    assert 0 < max(ends) < 59 and len(set(ends)) > 2, "the seeds must show something"
    output = model.generate(tokens, 60, stop_tokens=stop, generator=_generators(*range(6)))
    assert list(output.shape) == [6, 4 + max(ends) + 1]
    for row, expected, end in zip(output[:, 4:], free[:, 4:], ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end:] == row[end]).all()
    assert model.generate(tokens, 60, stop_tokens=range(V)).shape[1] == 5


def test_a_single_stop_token_is_one_of_a_set() -> None:
    model, tokens = rwkv(), _tokens(6, 4)
    for stop in (0, 3):
        expected = model.generate(tokens, 60, stop_tokens=[stop], generator=_generators(*range(6)))
        assert torch.equal(expected, model.generate(tokens, 60, stop_tokens=stop, generator=_generators(*range(6))))


# ---- embeddings in place of tokens ----


def _embedded(model: RWKV, tokens: Tensor) -> Tensor:
    return model.emb.weight.detach()[tokens]


@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_give_what_their_tokens_give(masked: bool, with_state: bool) -> None:
    model, tokens = rwkv(), _tokens(3, 5)
    mask, state = MASK if masked else None, model(_tokens(3, 8).flip(1))[1] if with_state else None
    embeds = _embedded(model, tokens).masked_fill((MASK == 0)[..., None], torch.nan) if masked else None
    embeds = _embedded(model, tokens) if embeds is None else embeds
    expected, found = model(tokens, state, mask), model(None, state, mask, inputs_embeds=embeds)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(x, y) for x, y in zip(found[1], expected[1], strict=True))
    settings: dict[str, Any] = {"attention_mask": mask, "state": state, "top_p": 0.9}
    whole = model.generate(tokens, 7, generator=_generators(1, 2, 3), **settings)
    new = model.generate(None, 7, inputs_embeds=embeds, generator=_generators(1, 2, 3), **settings)
    assert torch.equal(new, whole[:, 5:])
    assert list(model.generate(None, 0, inputs_embeds=embeds, **settings).shape) == [3, 0]


def test_gradients_reach_the_embeddings_that_are_given() -> None:
    model, tokens = rwkv(), _tokens(3, 5)
    for mask in (None, MASK):
        embeds = _embedded(model, tokens).requires_grad_()
        logits, _ = model(attention_mask=mask, inputs_embeds=embeds)
        logits.square().sum().backward()
        assert embeds.grad is not None
        assert torch.equal(embeds.grad.abs().amax(2) > 0, torch.ones(3, 5).bool() if mask is None else mask.bool())


@pytest.mark.parametrize(
    ("tokens", "embeds", "message"),
    [
        (None, None, "expected either tokens or inputs_embeds, got neither"),
        (_tokens(2, 3), torch.ones(2, 3, C).double(), "expected either tokens or inputs_embeds, got both"),
        (
            None,
            torch.ones(2, 3, C + 1).double(),
            rf"inputs_embeds: expected shape \[B, T, C\] with C = {C}, got",
        ),
        (None, torch.ones(2, C).double(), r"inputs_embeds: expected shape \[B, T, C\]"),
        (None, torch.ones(2, 3, C), "inputs_embeds: expected torch.float64 as the embeddings, got torch.float32"),
        (None, torch.ones(2, 0, C).double(), "tokens: expected a prompt of at least one token"),
    ],
    ids=["neither", "both", "width", "dimensions", "dtype", "empty"],
)
def test_embeddings_that_do_not_fit_are_refused(tokens: Tensor | None, embeds: Tensor | None, message: str) -> None:
    model = rwkv()
    with pytest.raises(ValueError, match=message):
        model.stream(tokens, 3, inputs_embeds=embeds)
    if "prompt" not in message:
        with pytest.raises(ValueError, match=message):
            model(tokens, inputs_embeds=embeds)


# ---- states ----


def test_a_saved_prefix_is_restored_branched_and_continued(tmp_path: Path) -> None:
    model, prefix = rwkv(), _tokens(1, 30)
    prompts = _tokens(3, 5)
    _, state = model(prefix)
    state.save(tmp_path / "prefix.state")
    loaded = RWKVState.load(tmp_path / "prefix.state")
    assert all(torch.equal(x, y) for x, y in zip(loaded, state, strict=True))
    assert not any(x.requires_grad for x in loaded)
    output = model.generate(prompts, 9, state=loaded.take([0, 0, 0]), temperature=0)
    whole = model.generate(torch.cat((prefix.expand(3, 30), prompts), 1), 9, temperature=0)
    assert torch.equal(output, whole[:, 30:])
    assert all(torch.equal(x, y) for x, y in zip(loaded, state, strict=True)), "a branch wrote to its root"


def test_states_are_picked_and_joined_by_sequence() -> None:
    _, state = rwkv()(_tokens(4, 6))
    parts = [state.take([2]), state.take(torch.tensor([0, 3]))]
    joined = RWKVState.cat(parts)
    for x, y in zip(joined, state, strict=True):
        assert torch.equal(x, y[:, [2, 0, 3]])
    parts[0].wkv.zero_()
    assert state.wkv[:, 2].abs().max() > 0


def test_a_file_of_something_else_is_no_state(tmp_path: Path) -> None:
    rwkv().save_pretrained(tmp_path / "rwkv.pth")
    with pytest.raises(ValueError, match=r"expected the tensors att_shift, ffn_shift, wkv, got \['blocks"):
        RWKVState.load(tmp_path / "rwkv.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, "at least one token"),
        ({"attention_mask": torch.ones(2, 3).int()}, r"attention_mask: expected shape \[2, 2\]"),
        ({"generator": _generators(1, 2, 3)}, "generator: expected one for each of 2 sequences, got 3"),
        ({"temperature": -1.0}, "temperature: .* got -1.0"),
    ],
)
def test_stream_says_what_is_wrong_before_the_first_token(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rwkv().stream(_tokens(2, 2), 3, **changes)


def test_the_example_of_a_prefix_cache_runs(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "prefix_cache.py"
    root = str(Path(rwkv_kernels.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same tokens" in result.stdout
