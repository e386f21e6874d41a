"""A user's expectations of a model in PyTorch: hooks, offloading, mixed dtypes, compilation, export and checkpoints."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import C, V, rwkv
from problems import assert_tensor_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from rwkv_kernels.nn import RWKV, Block, ChannelMix, RWKVState, TimeMix

B, T = 2, 9
# Two ways through three layers, some hundred roundings apart.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def _tokens(batch: int = B, steps: int = T) -> Tensor:
    return torch.randint(V, (batch, steps), generator=torch.Generator().manual_seed(1))


def _state(model: RWKV, batch: int = B) -> RWKVState:
    """After some tokens."""
    with torch.no_grad():
        return model(_tokens(batch).flip(1))[1]


def _assert_close(found: Any, expected: Any, allowed: float = TOLERANCE[torch.float32]) -> None:
    """Tensors, or RWKVStates and others that hold the same tensors in the same order."""
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True)
    for place, (a, b) in enumerate(pairs):
        assert_tensor_close(f"{place}", a, b, allowed)


@torch.no_grad()
def _stepped(model: RWKV, tokens: Tensor, state: RWKVState) -> Tensor:
    return torch.stack([model.step(token, state) for token in tokens.unbind(1)], 1)


# ---- modules are called, whether in parallel or token by token ----


def test_every_module_is_called_in_every_step_of_decoding() -> None:
    """As often as in the parallel model, by tensors of the same layout, and what hooks return is used."""
    model, calls = rwkv(torch.float32), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    shapes = []
    for block in model.blocks:
        for module in (block, block.att, block.ffn):
            module.register_forward_hook(
                lambda module, inputs, output: shapes.append((inputs[0].dim(), output[0].dim()))
            )
    model(_tokens())
    once, calls[:] = list(calls), []
    assert set(once) >= {"", "emb", "blocks.1", "blocks.1.att", "blocks.1.ffn", "blocks.1.att.key", "head"}
    _stepped(model, _tokens(steps=1), model.empty_state(B))
    assert calls == once
    calls.clear()
    model.generate(_tokens(), 3)
    assert calls == once * 3
    assert set(shapes) == {(3, 3)}


def test_a_hook_changes_what_is_decoded_as_it_changes_the_parallel_model() -> None:
    model, tokens = rwkv(torch.float32), _tokens()
    plain = model(tokens)[0]
    model.blocks[1].register_forward_hook(lambda module, inputs, output: (output[0] + 1, output[1]))
    model.blocks[0].att.register_forward_hook(lambda module, inputs, output: (output[0] * 2, *output[1:]))
    expected = model(tokens)[0]
    assert (expected - plain).abs().max() > 0.1
    _assert_close(_stepped(model, tokens, model.empty_state(B)), expected)
    output = model.generate(tokens, 8, temperature=0)
    assert torch.equal(output[:, T:], model(output[:, :-1])[0][:, T - 1 :].argmax(-1))


def _offload(module: nn.Module) -> None:
    """The module's own parameters are on the meta device but while it runs, as CPU offloading leaves them."""
    kept = dict(module.named_parameters(recurse=False))

    def place(which: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in kept.items():
            module._parameters[name] = nn.Parameter(which(parameter.data), requires_grad=False)

    module.register_forward_pre_hook(lambda *_: place(lambda data: data))
    module.register_forward_hook(lambda *_: place(lambda data: data.to("meta")))
    place(lambda data: data.to("meta"))


def test_weights_may_be_elsewhere_between_calls() -> None:
    model, tokens = rwkv(torch.float32), _tokens()
    expected, expected_state = model(tokens)
    generated = model.generate(tokens, 5, temperature=0)
    for module in list(model.modules()):
        _offload(module)
    assert all(parameter.is_meta for parameter in model.parameters())
    logits, state = model(tokens)
    _assert_close(logits, expected)
    _assert_close(state.att_shift, expected_state.att_shift)
    assert torch.equal(model.generate(tokens, 5, temperature=0), generated)
    _assert_close(_stepped(model, tokens, model.empty_state(B, device="cpu")), expected)


def test_a_wrapper_that_copies_the_state_does_not_lose_the_step() -> None:
    """As FSDP's mixed precision and the hooks that move tensors between devices do."""
    model, tokens = rwkv(torch.float32), _tokens()
    expected, state = model(tokens)[0], model.empty_state(B)
    copied = functools.partial(torch.utils._pytree.tree_map_only, Tensor, torch.clone)
    for module in (model, *model.blocks):
        module.register_forward_pre_hook(lambda module, inputs: copied(inputs))
    _assert_close(_stepped(model, tokens, state), expected)


# ---- dtypes ----


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_a_state_of_a_model_of_another_dtype_is_continued(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    ours, theirs = dtypes
    exact, _ = rwkv(torch.float32)(_tokens(), _state(rwkv(torch.float32)))
    model, state = rwkv(ours), _state(rwkv(theirs))
    allowed = TOLERANCE[torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32]
    logits, after = model(_tokens(), state)
    assert logits.dtype == after.att_shift.dtype == after.ffn_shift.dtype == ours
    assert after.wkv.dtype == torch.promote_types(ours, torch.float32)
    _assert_close(logits, exact, allowed)
    stepped = _stepped(model, _tokens(), state)
    assert [x.dtype for x in state] == [x.dtype for x in rwkv(theirs).empty_state(1)], "a step replaced the state"
    _assert_close(stepped, exact, allowed)


def test_a_wkv_state_that_lost_its_precision_is_refused() -> None:
    model, state = rwkv(torch.bfloat16), _state(rwkv(torch.bfloat16))
    rounded = state._replace(wkv=state.wkv.bfloat16())
    with pytest.raises(TypeError, match="or torch.float64, got torch.bfloat16.*cast_forward_inputs=False"):
        model(_tokens(), rounded)
    with pytest.raises(TypeError, match="cast_forward_inputs=False"), torch.no_grad():
        model.step(_tokens()[:, 0], rounded)


def test_time_parameters_may_be_float32_in_a_bfloat16_model() -> None:
    exact, _ = rwkv(torch.float32)(_tokens())
    model = rwkv(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "time_" in name:
            parameter.data = parameter.data.float()
    logits, _ = model(_tokens())
    assert logits.dtype == torch.bfloat16
    _assert_close(logits, exact, TOLERANCE[torch.bfloat16])
    _assert_close(_stepped(model, _tokens(), model.empty_state(B)), exact, TOLERANCE[torch.bfloat16])
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_none_is_an_empty_state_to_every_module() -> None:
    model, x = rwkv(torch.float32), torch.randn(B, T, C)
    empty = RWKVState(*(part[0] for part in model.empty_state(B)))
    block = model.blocks[0]
    assert isinstance(block, Block) and isinstance(block.att, TimeMix) and isinstance(block.ffn, ChannelMix)
    for steps in (T, 1):
        y = x[:, :steps]
        _assert_close(block(y), block(y, empty))
        _assert_close(block.att(y), block.att(y, empty.att_shift, empty.wkv))
        _assert_close(block.ffn(y), block.ffn(y, empty.ffn_shift))


# ---- compilation ----


def test_the_compiled_step_is_right_for_every_batch_in_few_graphs() -> None:
    model = rwkv(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.step, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 1, 7):
        eager, traced = _state(model, batch), _state(model, batch)
        token = _tokens(batch, 1)[:, 0]
        with torch.no_grad():
            _assert_close(compiled(token, traced), model.step(token, eager))
        _assert_close(traced, eager)
    assert counter.frame_count <= 3, "one for the first batch, one for any, one for a single sequence"


def test_the_compiled_step_refuses_to_lose_a_gradient() -> None:
    model = rwkv(torch.float32, layers=1)
    state = _state(model)
    before = state.clone()
    with pytest.raises(ValueError, match="no gradient"):
        torch.compile(model.step, backend="eager")(_tokens()[:, 0], state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_compiled_checkpointing_of_blocks_gives_eager_gradients() -> None:
    model, tokens = rwkv(torch.float32, layers=2), _tokens()

    def loss(tokens: Tensor) -> Tensor:
        """From no state, and from an empty one that is made inside."""
        return sum(model(tokens, s)[0].sin().sum() for s in (None, model.empty_state(B)))  # type: ignore[return-value]

    def gradients(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(tokens), list(model.parameters()))

    expected = gradients(loss)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    _assert_close(gradients(torch.compile(loss, backend="aot_eager", fullgraph=True)), expected)


class _Step(nn.Module):
    """A step as a module, which is what torch.export takes."""

    def __init__(self, model: RWKV) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: RWKVState) -> Tensor:
        return self.model.step(tokens, state)


@pytest.fixture(scope="module")
def exported_step() -> tuple[RWKV, torch.export.ExportedProgram]:
    model = rwkv(torch.float32, layers=2)
    batch = torch.export.Dim("B", min=1, max=64)
    shapes = ({0: batch}, RWKVState({1: batch}, {1: batch}, {1: batch}))  # type: ignore[arg-type]
    with torch.no_grad():
        program = torch.export.export(_Step(model), (torch.tensor([1, 2]), _state(model)), dynamic_shapes=shapes)
    return model, program


@torch.no_grad()
def _assert_steps(model: RWKV, program: Callable[[Tensor, RWKVState], Tensor]) -> None:
    for batch in (3, 1, 5):
        eager, moved = _state(model, batch), _state(model, batch)
        for token in _tokens(2, batch):  # contiguous, as a package takes it
            _assert_close(program(token, moved), model.step(token, eager))
        _assert_close(moved, eager)


def test_the_step_is_exported_saved_and_loaded_for_any_batch(exported_step: Any, tmp_path: Path) -> None:
    model, program = exported_step
    torch.export.save(program, tmp_path / "step.pt2")
    _assert_steps(model, torch.export.load(tmp_path / "step.pt2").module())


def test_the_packaged_step_takes_any_batch(exported_step: Any, tmp_path: Path) -> None:
    """AOTInductor compiles C++, which is most of this test's time."""
    model, program = exported_step
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    _assert_steps(model, torch._inductor.aoti_load_package(package))


def test_the_model_is_exported_saved_and_loaded_with_a_state(tmp_path: Path) -> None:
    model = rwkv(torch.float32, layers=2)
    batch, steps = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=2, max=64)
    shapes = ({0: batch, 1: steps}, RWKVState({1: batch}, {1: batch}, {1: batch}))  # type: ignore[arg-type]
    program = torch.export.export(model, (_tokens(), _state(model)), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (3, 1):
        given = (_tokens(size, 14), _state(model, size))
        _assert_close(loaded(*given), model(*given))


# ---- the state ----


def test_torch_load_reads_a_checkpoint_with_a_state_by_weights_only(tmp_path: Path) -> None:
    state = _state(rwkv(torch.float32))
    torch.save({"step": 3, "state": state}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    assert isinstance(loaded, RWKVState)
    assert all(torch.equal(a, b) for a, b in zip(loaded, state, strict=True))


def test_a_state_is_converted_detached_and_copied() -> None:
    state = rwkv(torch.float32)(_tokens())[1]
    for narrow in (state.to(torch.bfloat16), state.to(dtype=torch.bfloat16), state.to("cpu", torch.bfloat16)):
        assert [x.dtype for x in narrow] == [torch.bfloat16, torch.bfloat16, torch.float32]
        assert torch.equal(narrow.wkv, state.wkv)
    assert {x.dtype for x in state.to(torch.float64)} == {torch.float64}
    assert state.to(torch.float64).to("cpu").wkv.dtype == torch.float64
    assert {x.device.type for x in state.to("meta")} == {"meta"}
    assert all(x.requires_grad for x in state) and not any(x.requires_grad for x in state.detach())
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(state, state.detach(), strict=True))
    copy = state.clone()
    assert all(x.requires_grad and x.data_ptr() != y.data_ptr() for x, y in zip(copy, state, strict=True))


def test_the_logits_after_the_last_token_alone() -> None:
    model, tokens = rwkv(torch.float32), _tokens(3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0], [1] * 9, [0] * 9])
    _assert_close(model(tokens, last_only=True), (model(tokens)[0][:, -1:], model(tokens)[1]))
    logits, state = model(tokens, attention_mask=mask)
    last, last_state = model(tokens, attention_mask=mask, last_only=True)
    _assert_close(last, torch.stack((logits[0, 6:7], logits[1, 8:9], torch.zeros(1, V))))
    _assert_close(last_state, state)


# ---- FSDP with mixed precision ----


def _fsdp1(model: RWKV, cast: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=MixedPrecision(torch.bfloat16, cast_forward_inputs=cast, cast_root_forward_inputs=cast),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def _fsdp2(model: RWKV, cast: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=cast)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("cast", [True, False], ids=["cast", "uncast"])
@pytest.mark.parametrize("shard", [_fsdp1, _fsdp2])
def test_fsdp_trains_in_bfloat16_and_the_wkv_state_stays_float32(
    shard: Callable[[RWKV, bool], nn.Module], cast: bool, single_process: None
) -> None:
    tokens = _tokens()
    exact, exact_state = rwkv(torch.float32)(tokens)
    exact_resumed, _ = rwkv(torch.float32)(tokens, exact_state)
    model = shard(rwkv(torch.float32), cast)
    logits, state = model(tokens)
    assert (logits.dtype, state.att_shift.dtype, state.wkv.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    _assert_close(logits, exact, TOLERANCE[torch.bfloat16])
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    if cast:
        with pytest.raises(TypeError, match="cast_forward_inputs=False"):
            model(tokens, state.detach())
        return
    resumed, after = model(tokens, state.detach())
    assert after.wkv.dtype == torch.float32
    _assert_close(resumed, exact_resumed, TOLERANCE[torch.bfloat16])
    resumed.float().sum().backward()
    if shard is _fsdp2:
        stepped = _stepped(model, tokens, model.empty_state(B))  # type: ignore[arg-type, operator]
        _assert_close(stepped, exact, TOLERANCE[torch.bfloat16])
        assert list(model.generate(tokens, 3).shape) == [B, T + 3]  # type: ignore[operator]
