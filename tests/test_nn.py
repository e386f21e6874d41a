"""The model: the published layout of parameters, the paper's formulas, and one set of weights run in two ways."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import C, V, rwkv
from problems import assert_tensor_close, widest_dtype
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.nn import RWKV, Block, RWKVState

L, B, T = 3, 2, 21
# Some hundred roundings of accumulated length separate the two ways through three layers.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 5e-2}


def _tokens(steps: int = T) -> Tensor:
    """The same tokens on every device, and on torch's default one."""
    tokens = torch.randint(V, (B, steps), generator=torch.Generator().manual_seed(1), device="cpu")
    return tokens.to(torch.get_default_device())


def _assert_close(name: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    assert_tensor_close(name, found.detach(), expected.detach(), allowed)


def _states_close(found: RWKVState, expected: RWKVState, allowed: float) -> None:
    """A WKV state is known up to its gauge: num/den and the logarithm of den·e^max."""
    _assert_close("att_shift", found.att_shift, expected.att_shift, allowed)
    _assert_close("ffn_shift", found.ffn_shift, expected.ffn_shift, allowed)
    (num, den, top), (num_e, den_e, top_e) = found.wkv.unbind(2), expected.wkv.unbind(2)
    _assert_close("num/den", num / den, num_e / den_e, allowed)
    _assert_close("log den", top + den.log(), top_e + den_e.log(), allowed)


@pytest.fixture
def chosen(compiled_backend: str) -> Iterator[None]:
    """Every compiled backend in turn, as the meaning of "auto"."""
    with rwkv_kernels.use_backend(compiled_backend):
        yield


# ---- the same weights, in parallel and token by token ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_in_place_give_the_logits_and_the_state_of_the_whole_sequence(dtype: torch.dtype, chosen: None) -> None:
    model, tokens = rwkv(dtype), _tokens()
    logits, whole_state = model(tokens)
    state = model.empty_state(B)
    with torch.no_grad():
        stepped = torch.stack([model.step(token, state) for token in tokens.unbind(1)], 1)
    assert logits.dtype == stepped.dtype == dtype
    _assert_close("logits", stepped, logits, TOLERANCE[dtype])
    _states_close(state, whole_state, TOLERANCE[dtype])


@pytest.mark.parametrize("cuts", [[8, 13], [1] * T, [0, 20, 0, 1]], ids=["two", "every_token", "empty_pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_split_and_resume_equals_whole(dtype: torch.dtype, cuts: list[int], chosen: None) -> None:
    model, tokens = rwkv(dtype), _tokens()
    logits, whole_state = model(tokens)
    state, pieces = None, []
    for piece in tokens.split(cuts, 1):
        piece_logits, state = model(piece, state)
        pieces.append(piece_logits)
    assert state is not None
    _assert_close("logits", torch.cat(pieces, 1), logits, TOLERANCE[dtype])
    _states_close(state, whole_state, TOLERANCE[dtype])


def test_no_tokens_leave_the_state_as_it_is() -> None:
    model = rwkv(torch.float32)
    state = model(_tokens())[1]
    logits, same = model(_tokens(0), state)
    assert list(logits.shape) == [B, 0, V]
    assert all(torch.equal(a, b) for a, b in zip(state, same, strict=True))


def test_gradients_through_the_state_equal_those_of_the_whole_sequence() -> None:
    model, tokens = rwkv(torch.float64), _tokens()
    weights = torch.randn(B, T, V, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    whole = torch.autograd.grad((model(tokens)[0] * weights).sum(), list(parameters.values()))
    first, state = model(tokens[:, :9])
    second, _ = model(tokens[:, 9:], state)
    split = torch.autograd.grad((torch.cat((first, second), 1) * weights).sum(), list(parameters.values()))
    for name, found, expected in zip(parameters, split, whole, strict=True):
        assert expected.abs().max() > 0, name
        _assert_close(name, found, expected, 1e-11)


def test_the_second_part_alone_sends_gradients_into_every_part_of_the_state() -> None:
    model, tokens = rwkv(torch.float64), _tokens()
    given = RWKVState(*(x.detach().requires_grad_() for x in model(tokens)[1]))
    model(tokens, given)[0].square().sum().backward()
    for x in given:
        assert x.grad is not None
        assert (x.grad.flatten(1).abs().amax(1) > 0).all(), "a layer's state has no gradient"


def test_a_given_state_is_not_modified() -> None:
    model, tokens = rwkv(torch.float32), _tokens()
    state = model(tokens)[1]
    before = [x.clone() for x in state]
    model(tokens, state)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


# ---- the paper's formulas ----


def test_a_block_computes_the_formulas_of_the_paper() -> None:
    """Section 3 of arXiv 2305.13048, token after token with the sums as they stand there, in float64."""
    torch.manual_seed(0)
    block = Block(C, 40, 0, 2).double()
    p = {name: parameter.data.normal_(0, 0.4) for name, parameter in block.named_parameters()}
    x = torch.randn(T, C, dtype=torch.float64)

    def normalised(x: Tensor, name: str) -> Tensor:
        deviation = x - x.mean()
        return deviation / (deviation.square().mean() + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def mixed(now: Tensor, before: Tensor, name: str) -> Tensor:
        mix = p[name].flatten()
        return mix * now + (1 - mix) * before

    ks: list[Tensor] = []
    vs: list[Tensor] = []
    expected = []
    att_before = ffn_before = torch.zeros(C, dtype=torch.float64)
    for t in range(T):
        xt = normalised(x[t], "ln0")
        att = normalised(xt, "ln1")
        r = p["att.receptance.weight"] @ mixed(att, att_before, "att.time_mix_r")
        k = p["att.key.weight"] @ mixed(att, att_before, "att.time_mix_k")
        v = p["att.value.weight"] @ mixed(att, att_before, "att.time_mix_v")
        weights = [torch.exp(-(t - 1 - s) * p["att.time_decay"].exp() + ks[s]) for s in range(t)]
        weights.append(torch.exp(p["att.time_first"] + k))
        ks.append(k)
        vs.append(v)
        average = sum(w * vt for w, vt in zip(weights, vs, strict=True)) / sum(weights)
        xt = xt + p["att.output.weight"] @ (r.sigmoid() * average)
        ffn = normalised(xt, "ln2")
        r = p["ffn.receptance.weight"] @ mixed(ffn, ffn_before, "ffn.time_mix_r")
        k = p["ffn.key.weight"] @ mixed(ffn, ffn_before, "ffn.time_mix_k")
        expected.append(xt + r.sigmoid() * (p["ffn.value.weight"] @ k.clamp(min=0) ** 2))
        att_before, ffn_before = att, ffn

    empty = rwkv_kernels.empty_state(1, C, dtype=torch.float64)
    before = torch.zeros(1, C, dtype=torch.float64)
    found, state = block(x[None], RWKVState(before, before, empty))
    _assert_close("block", found[0], torch.stack(expected), 1e-12)
    _assert_close("att_shift", state.att_shift[0], att_before, 1e-12)
    _assert_close("ffn_shift", state.ffn_shift[0], ffn_before, 1e-12)


def test_initial_values_are_the_published_ones() -> None:
    state = RWKV(V, C, L).state_dict()
    for layer in range(L):
        for i in range(C):
            decay = -5 + 8 * (i / (C - 1)) ** (0.7 + 1.3 * layer / (L - 1))
            assert state[f"blocks.{layer}.att.time_decay"][i].item() == pytest.approx(decay, rel=1e-5)
            first = torch.tensor(0.3).log().item() + (0, 0.5, -0.5)[i % 3]
            assert state[f"blocks.{layer}.att.time_first"][i].item() == pytest.approx(first, rel=1e-5)
            rest = 1 - layer / L
            mix = (i / C) ** rest
            expected = {
                "att.time_mix_k": mix,
                "att.time_mix_v": mix + 0.3 * layer / (L - 1),
                "att.time_mix_r": (i / C) ** (0.5 * rest),
                "ffn.time_mix_k": mix,
                "ffn.time_mix_r": mix,
            }
            for name, value in expected.items():
                assert state[f"blocks.{layer}.{name}"][0, 0, i].item() == pytest.approx(value, rel=1e-5), name
    zeros = {name for name, x in state.items() if name.endswith("weight") and not x.any()}
    names = ("att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value")
    assert zeros == {f"blocks.{layer}.{name}.weight" for layer in range(L) for name in names}
    assert 0 < state["emb.weight"].abs().max() <= 1e-4


def test_a_single_layer_of_a_single_channel_has_finite_initial_values() -> None:
    assert all(x.isfinite().all() for x in RWKV(2, 1, 1).state_dict().values())


# ---- the published layout ----

LAYOUT = {
    "emb.weight": [50, 8],
    "blocks.0.ln0.weight": [8],
    "blocks.0.ln0.bias": [8],
    "ln_out.weight": [8],
    "ln_out.bias": [8],
    "head.weight": [50, 8],
}
for _i in range(2):
    LAYOUT |= {
        f"blocks.{_i}.ln1.weight": [8],
        f"blocks.{_i}.ln1.bias": [8],
        f"blocks.{_i}.ln2.weight": [8],
        f"blocks.{_i}.ln2.bias": [8],
        f"blocks.{_i}.att.time_decay": [8],
        f"blocks.{_i}.att.time_first": [8],
        f"blocks.{_i}.att.time_mix_k": [1, 1, 8],
        f"blocks.{_i}.att.time_mix_v": [1, 1, 8],
        f"blocks.{_i}.att.time_mix_r": [1, 1, 8],
        f"blocks.{_i}.att.key.weight": [8, 8],
        f"blocks.{_i}.att.value.weight": [8, 8],
        f"blocks.{_i}.att.receptance.weight": [8, 8],
        f"blocks.{_i}.att.output.weight": [8, 8],
        f"blocks.{_i}.ffn.time_mix_k": [1, 1, 8],
        f"blocks.{_i}.ffn.time_mix_r": [1, 1, 8],
        f"blocks.{_i}.ffn.key.weight": [32, 8],
        f"blocks.{_i}.ffn.receptance.weight": [8, 8],
        f"blocks.{_i}.ffn.value.weight": [8, 32],
    }


def _checkpoint() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in LAYOUT.items()}


def test_names_and_shapes_are_those_of_published_checkpoints() -> None:
    model = RWKV(50, 8, 2)
    assert {name: list(x.shape) for name, x in model.state_dict().items()} == LAYOUT
    assert {name for name, _ in model.named_parameters()} == set(LAYOUT)


def test_load_state_dict_takes_a_published_checkpoint(tmp_path: Path) -> None:
    checkpoint = {name: x.bfloat16() for name, x in _checkpoint().items()}
    torch.save(checkpoint, tmp_path / "rwkv.pth")
    model = RWKV(50, 8, 2)
    model.load_state_dict(torch.load(tmp_path / "rwkv.pth"))
    assert all(torch.equal(x, checkpoint[name].float()) for name, x in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_state_dict_infers_sizes_and_dtype_and_copies(dtype: torch.dtype) -> None:
    checkpoint = {name: x.to(dtype) for name, x in _checkpoint().items()}
    checkpoint |= {f"blocks.{i}.ffn.key.weight": torch.randn(24, 8).to(dtype) for i in range(2)}
    checkpoint |= {f"blocks.{i}.ffn.value.weight": torch.randn(8, 24).to(dtype) for i in range(2)}
    model = RWKV.from_state_dict(checkpoint)
    for name, x in model.state_dict().items():
        assert x.dtype == dtype
        assert torch.equal(x, checkpoint[name]), name
        assert x.data_ptr() != checkpoint[name].data_ptr(), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model(torch.tensor([[1, 49]]))[0].shape) == [1, 2, 50]


def _without(name: str) -> dict[str, Tensor]:
    return {key: x for key, x in _checkpoint().items() if key != name}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "expected a matrix 'emb.weight', got none"),
        (_without("emb.weight"), "expected a matrix 'emb.weight', got none"),
        (_checkpoint() | {"emb.weight": torch.ones(3)}, r"expected a matrix 'emb.weight', got \[3\]"),
        (_without("blocks.1.att.time_first"), r"of 2 layers: missing blocks.1.att.time_first \[8\]$"),
        (_checkpoint() | {"head.bias": torch.ones(50)}, "unknown head.bias$"),
        (
            _checkpoint() | {"blocks.1.ln1.bias": torch.ones(9)},
            r"blocks.1.ln1.bias: expected shape \[8\], got \[9\]$",
        ),
        (
            {**_without("ln_out.bias"), "gap": torch.ones(1), "head.weight": torch.ones(2, 2)},
            r"missing ln_out.bias \[8\]; unknown gap; head.weight: expected shape \[50, 8\], got \[2, 2\]$",
        ),
    ],
    ids=["empty", "no_embedding", "flat_embedding", "missing", "unknown", "shape", "everything_at_once"],
)
def test_from_state_dict_names_what_does_not_fit(checkpoint: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RWKV.from_state_dict(checkpoint)


# ---- generation ----


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_generate_is_reproducible_with_a_generator(top_p: float) -> None:
    model, prompt = rwkv(torch.float32), _tokens(4)

    def sample(seed: int) -> Tensor:
        return model.generate(prompt, 20, top_p=top_p, generator=torch.Generator().manual_seed(seed))

    first = sample(5)
    assert list(first.shape) == [B, 24]
    assert torch.equal(first[:, :4], prompt)
    assert torch.equal(first, sample(5))
    assert not torch.equal(first, sample(6))


def test_greedy_generation_is_the_argmax_of_the_parallel_model() -> None:
    model, prompt = rwkv(torch.float64), _tokens(4)
    output = model.generate(prompt, 15, temperature=0)
    logits, _ = model(output[:, :-1])
    assert torch.equal(output[:, 4:], logits[:, 3:].argmax(-1))
    # The likeliest token alone reaches this probability.
    assert torch.equal(output, model.generate(prompt, 15, top_p=1e-6))


def test_sampling_follows_temperature_and_top_p() -> None:
    model = rwkv(torch.float64)
    prompt = _tokens(4)[:1]
    expected = torch.softmax(model(prompt)[0][0, -1] / 1.5, -1)
    order = expected.argsort(descending=True)
    kept = order[: int((expected[order].cumsum(0) < 0.6).sum()) + 1]
    expected = torch.zeros_like(expected).index_copy(0, kept, expected[kept] / expected[kept].sum())
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    output = model.generate(prompt.expand(draws, 4), 1, temperature=1.5, top_p=0.6, generator=generator)
    frequencies = output[:, 4].bincount(minlength=V) / draws
    assert (frequencies[expected == 0] == 0).all()
    # Five standard deviations of a frequency among so many draws.
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_generate_modifies_nothing_that_it_is_given() -> None:
    model, prompt = rwkv(torch.float32), _tokens(4)
    before, weights = prompt.clone(), {name: x.clone() for name, x in model.state_dict().items()}
    model.generate(prompt, 5)
    assert torch.equal(prompt, before)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.tensor([1, 2])}, r"tokens: expected shape \[B, T\], got \[2\]"),
        ({"tokens": torch.ones(1, 2)}, "tokens: expected torch.int64, got torch.float32"),
        ({"tokens": torch.ones(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
        ({"temperature": -0.5}, "temperature: .* got -0.5"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"top_p": 0.0}, r"top_p: .* \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p: .* \(0, 1\], got 1.1"),
    ],
)
def test_generate_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": _tokens(4), "max_new_tokens": 1}
    with pytest.raises(ValueError, match=message):
        rwkv(torch.float32).generate(**(arguments | changes))


def test_forward_and_step_say_what_is_wrong() -> None:
    model, tokens = rwkv(torch.float32), _tokens()
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"tokens: expected torch.int64, got torch.int32"):
        model(tokens.int())
    with pytest.raises(ValueError, match=r"state.att_shift: expected shape \[3, 2, 16\], got \[3, 5, 16\]"):
        model(tokens, model.empty_state(5))
    with pytest.raises(ValueError, match=r"state.wkv: expected shape \[3, 2, 3, 16\], got \[2, 2, 3, 16\]"):
        model(tokens, model.empty_state(B)._replace(wkv=torch.zeros(2, B, 3, C)))
    with pytest.raises(ValueError, match=r"expected positive numbers, got .*layers=0"):
        RWKV(V, C, 0)
    state = model.empty_state(B)
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B\]"):
        model.step(tokens, state)
    with pytest.raises(ValueError, match="no gradient"):
        model.step(tokens[:, 0], state)
    assert all(torch.equal(x, y) for x, y in zip(state, model.empty_state(B), strict=True))


# ---- backends, precisions, compilation ----


def test_every_backend_gives_the_same_logits_and_gradients(compiled_backend: str) -> None:
    dtype = widest_dtype(compiled_backend)
    model, tokens = rwkv(dtype), _tokens()
    results = []
    for name in ("reference", compiled_backend):
        with rwkv_kernels.use_backend(name):
            logits, state = model(tokens)
            gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            results.append((logits, state, gradients, model.generate(tokens, 5, temperature=0)))
    (expected, expected_state, expected_gradients, expected_tokens), (logits, state, gradients, generated) = results
    _assert_close("logits", logits, expected, 10 * TOLERANCE[dtype])
    _states_close(state, expected_state, 10 * TOLERANCE[dtype])
    for (name, _), found, exact in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        _assert_close(name, found, exact, 100 * TOLERANCE[dtype])
    assert torch.equal(generated, expected_tokens)


def test_compiles_into_one_graph(chosen: None) -> None:
    model, tokens = rwkv(torch.float32, layers=2), _tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, state = model(tokens)
    logits, compiled_state = compiled(tokens)
    _assert_close("logits", logits, expected, TOLERANCE[torch.float32])
    _states_close(compiled_state, state, TOLERANCE[torch.float32])
    gradients = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (logits, expected)]
    for (name, _), found, exact in zip(model.named_parameters(), *gradients, strict=True):
        _assert_close(name, found, exact, TOLERANCE[torch.float32])
    _assert_close("resumed", compiled(tokens, state)[0], model(tokens, state)[0], TOLERANCE[torch.float32])


def test_autocast_runs_in_bfloat16_close_to_float32(chosen: None) -> None:
    model, tokens = rwkv(torch.float32), _tokens()
    expected, _ = model(tokens)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits, state = model(tokens)
        resumed, _ = model(tokens, state)
        generated = model.generate(tokens, 3)
    assert logits.dtype == resumed.dtype == torch.bfloat16
    assert state.wkv.dtype == torch.float32
    assert list(generated.shape) == [B, T + 3]
    _assert_close("logits", logits, expected, TOLERANCE[torch.bfloat16])
    F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("decay_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bfloat16_model_works_in_both_ways(decay_dtype: torch.dtype) -> None:
    exact, _ = rwkv(torch.float32)(_tokens())
    model, tokens = rwkv(torch.bfloat16), _tokens()
    for name, parameter in model.named_parameters():
        if name.endswith(("time_decay", "time_first")):
            parameter.data = parameter.data.to(decay_dtype)
    logits, whole_state = model(tokens)
    state = model.empty_state(B)
    with torch.no_grad():
        stepped = torch.stack([model.step(token, state) for token in tokens.unbind(1)], 1)
    assert logits.dtype == stepped.dtype == state.att_shift.dtype == torch.bfloat16
    assert state.wkv.dtype == whole_state.wkv.dtype == torch.float32
    _assert_close("logits", logits, exact, TOLERANCE[torch.bfloat16])
    _assert_close("steps", stepped, exact, TOLERANCE[torch.bfloat16])
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- the example ----


def test_the_demo_writes_a_report_with_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    example = Path(__file__).parents[1] / "examples" / "train_bytes.py"
    environment = os.environ | {"PYTHONPATH": str(Path(rwkv_kernels.__file__).parents[1])}
    command = [sys.executable, str(example), "--minutes", "0.02"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    report = (tmp_path / "demo" / "report.md").read_text()
    for plot in ("loss.png", "times.png"):
        assert f"({plot})" in report
        assert (tmp_path / "demo" / plot).read_bytes().startswith(b"\x89PNG")
    assert "| zlib -9 |" in report
