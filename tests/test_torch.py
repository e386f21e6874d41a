"""A user's expectations of an operator of PyTorch: compile, export, functional transforms, checkpointing, autocast."""

import concurrent.futures
import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.benchmark
from models import randomised
from problems import Problem, make, widest_dtype, without_gauge
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

import rwkv_kernels
from benchmarks.latency import PLAIN, gradient_calls
from rwkv_kernels import reference
from rwkv_kernels._backends import registry
from rwkv_kernels.nn import RWKV, Block, RWKVState

ARGUMENTS = (0, 1, 2, 3, 4)


# Relative and absolute, between two results that were rounded differently.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def _inputs(backend: str, **changes: Any) -> tuple[Tensor, ...]:
    tensors = make(Problem(T=70, C=5, with_state=True, **changes)).widest(backend)
    assert tensors.state is not None
    return tensors.w, tensors.u, tensors.k, tensors.v, tensors.state


def _loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar of both results that respects the state's gauge."""

    def loss(*inputs: Tensor) -> Tensor:
        y, state = function(*inputs)
        return (y**2).sum() + (state[:, 0] / state[:, 1]).sum() + (state[:, 2] + state[:, 1].log()).sum()

    return loss


def _wkv(*inputs: Tensor) -> Any:
    return rwkv_kernels.wkv(*inputs, return_state=True)


def _assert_all_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[b.dtype], atol=TOLERANCE[b.dtype])


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(with_state: bool, requires_grad: bool, operators: Any) -> None:
    w, u, k, v, state = (x.requires_grad_(requires_grad) for x in _inputs(operators.backend))
    given = state if with_state else None
    for checkpoint in (False, True):
        torch.library.opcheck(operators.forward, (w, u, k, v, given, checkpoint))
    with torch.no_grad():
        _, after, checkpoints = operators.forward(w, u, k, v, given, True)
        gradients = (v.detach().clone(), after if with_state else None)
        backward_inputs = [x if x is None else x.detach() for x in (w, u, k, v, given, checkpoints)]
        torch.library.opcheck(operators.backward, (*backward_inputs, *gradients))
        kt, vt = k.detach()[:, 0], v.detach()[:, 0]
        for r in (None, vt):
            step_inputs = (w.detach(), u.detach(), kt, vt, state.detach().clone(), r)
            torch.library.opcheck(operators.step, step_inputs)


def test_gradcheck(compiled_backend: str) -> None:
    if widest_dtype(compiled_backend) != torch.float64:
        pytest.skip(f"{compiled_backend} has no float64, without which differences say nothing")
    inputs = [x[:, :9].contiguous() if x.shape[1:] == (70, 5) else x for x in _inputs(compiled_backend)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: rwkv_kernels.wkv(*x, backend=compiled_backend), inputs)


@pytest.mark.parametrize("inputs", [4, 5], ids=["without_state", "with_state"])
def test_compiles_whole_and_differentiates(inputs: int, compiled_backend: str) -> None:
    compiled = torch.compile(_wkv, fullgraph=True)
    given = [x.requires_grad_() for x in _inputs(compiled_backend)][:inputs]
    with rwkv_kernels.use_backend(compiled_backend):
        found = torch.autograd.grad(_loss(compiled)(*given), given)
    _assert_all_close(found, torch.autograd.grad(_loss(reference.wkv)(*given), given))


def test_compiles_with_dynamic_shapes(compiled_backend: str) -> None:
    compiled = torch.compile(_wkv, fullgraph=True, dynamic=True)
    w, u, *_ = _inputs(compiled_backend)
    for B, T in [(2, 70), (3, 200), (2, 33), (5, 64), (5, 65)]:
        tensors = make(Problem(B=B, T=T, C=5)).widest(compiled_backend)
        given = [w, u, tensors.k.requires_grad_(), tensors.v.requires_grad_()]
        with rwkv_kernels.use_backend(compiled_backend):
            found = torch.autograd.grad(_loss(compiled)(*given), given[2:])
        _assert_all_close(found, torch.autograd.grad(_loss(reference.wkv)(*given), given[2:]))


def test_compiled_code_follows_use_backend() -> None:
    w, u, k, v, _ = _inputs("cpu")
    compiled = torch.compile(lambda k: rwkv_kernels.wkv(w, u, k, v[:, :3]), fullgraph=True)
    with rwkv_kernels.use_backend("reference"):
        torch.testing.assert_close(compiled(k[:, :3]), reference.wkv(w, u, k[:, :3], v[:, :3])[0])


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_the_step(gated: bool, compiled_backend: str) -> None:
    w, u, k, v, state = _inputs(compiled_backend)
    r = v[:, 1] if gated else None
    eager, traced = state.clone(), state.clone()
    compiled = torch.compile(rwkv_kernels.wkv_step, fullgraph=True)
    with rwkv_kernels.use_backend(compiled_backend):
        expected = rwkv_kernels.wkv_step(w, u, k[:, 0], v[:, 0], eager, r=r)
        torch.testing.assert_close(compiled(w, u, k[:, 0], v[:, 0], traced, r=r), expected)
    torch.testing.assert_close(traced, eager)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "select": lambda state: state[1],
    "unbind": lambda state: state.unbind()[1],
    "slice": lambda state: state[1:2].squeeze(0),
    "transposed": lambda state: state.view(3, -1, 5, 3).transpose(2, 3)[1],
}


def test_a_compiled_step_moves_the_views_of_states_that_it_is_given() -> None:
    """By Inductor, for any batch: the offset of layer 1 depends on B, and torch loses that of a mutated view."""
    w, u = torch.linspace(-1, 1, 5), torch.linspace(1, 0, 5)

    def step(k: Tensor, states: dict[str, Tensor]) -> list[Tensor]:
        return [rwkv_kernels.wkv_step(w, u, k, k + 1, view(states[name]), r=k) for name, view in VIEWS.items()]

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for B in (2, 5, 3):
        states = {name: torch.rand(3, B, 3, 5, generator=torch.Generator().manual_seed(B)) for name in VIEWS}
        traced = {name: state.clone() for name, state in states.items()}
        k = torch.linspace(-2, 2, 5 * B).view(B, 5)
        for name, found, expected in zip(VIEWS, compiled(k, traced), step(k, states), strict=True):
            torch.testing.assert_close(found, expected, msg=lambda message, name=name: f"{name}: {message}")
            torch.testing.assert_close(traced[name][::2], states[name][::2], rtol=0, atol=0)  # the other layers
            a, b = (without_gauge(found, VIEWS[name](state)) for state in (traced[name], states[name]))
            torch.testing.assert_close(a, b)


def test_the_operator_of_the_step_refuses_a_view_that_a_compiler_would_lose() -> None:
    """Called directly: with a reason in one graph, and outside of the graph where it may be."""
    w, u = torch.linspace(-1, 1, 5), torch.linspace(1, 0, 5)

    def step(k: Tensor, state: Tensor) -> Tensor:
        result: Tensor = torch.ops.rwkv_kernels.wkv_step(w, u, k, k, state[1])
        return result

    k = torch.linspace(-2, 2, 10).view(2, 5)
    with pytest.raises(Exception, match="use rwkv_kernels.wkv_step"):
        torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(k, torch.rand(3, 2, 3, 5))
    eager = torch.rand(3, 2, 3, 5)
    traced = eager.clone()
    torch.testing.assert_close(torch.compile(step, backend="aot_eager", dynamic=True)(k, traced), step(k, eager))
    torch.testing.assert_close(traced, eager)


def test_exports_with_dynamic_length(compiled_backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
            return _wkv(w, u, k, v, state)

    inputs = _inputs(compiled_backend)
    steps = torch.export.Dim("T", min=2, max=4096)
    with rwkv_kernels.use_backend(compiled_backend):
        program = torch.export.export(Module(), inputs, dynamic_shapes=({}, {}, {1: steps}, {1: steps}, {}))
    longer = make(Problem(T=200, C=5)).widest(compiled_backend)
    w, u, _, _, state = inputs
    found = program.module()(w, u, longer.k, longer.v, state)
    _assert_all_close(without_gauge(*found), without_gauge(*reference.wkv(w, u, longer.k, longer.v, state)))


def test_func_grad(compiled_backend: str) -> None:
    inputs = _inputs(compiled_backend)
    with rwkv_kernels.use_backend(compiled_backend):
        found = torch.func.grad(_loss(_wkv), ARGUMENTS)(*inputs)
    _assert_all_close(found, torch.func.grad(_loss(reference.wkv), ARGUMENTS)(*inputs))


@pytest.mark.parametrize(
    "in_dims", [(None, None, 0, 0, None), (0, None, 0, None, None), (0, 0, 1, 2, 3), (None, 0, 3, 0, 1)]
)
def test_vmap(in_dims: tuple[int | None, ...], compiled_backend: str) -> None:
    inputs = [
        x if dim is None else torch.stack([x, x / 2, x / 3], dim)
        for x, dim in zip(_inputs(compiled_backend), in_dims, strict=True)
    ]
    with rwkv_kernels.use_backend(compiled_backend):
        found = torch.vmap(_wkv, in_dims)(*inputs)
    y, state = torch.vmap(reference.wkv, in_dims)(*inputs)
    _assert_all_close((found[0],), (y,))
    torch.testing.assert_close(found[1][:, :, 0] / found[1][:, :, 1], state[:, :, 0] / state[:, :, 1])


def test_per_sample_gradients(compiled_backend: str) -> None:
    """vmap over grad: the gradients of shared parameters, one for every sample."""
    w, u, k, v, state = _inputs(compiled_backend, B=4)
    in_dims = (None, None, 0, 0, 0)
    samples = (w, u, k[:, None], v[:, None], state[:, None])
    with rwkv_kernels.use_backend(compiled_backend):
        found = torch.vmap(torch.func.grad(_loss(_wkv), ARGUMENTS), in_dims)(*samples)
    _assert_all_close(found, torch.vmap(torch.func.grad(_loss(reference.wkv), ARGUMENTS), in_dims)(*samples))


def test_vmap_inside_autograd(compiled_backend: str) -> None:
    w, u, k, v, _ = _inputs(compiled_backend)
    k = torch.stack([k, k / 2]).requires_grad_()
    w = w.requires_grad_()

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        y = torch.vmap(lambda k: function(w, u, k, v)[0])(k)
        return torch.autograd.grad((y**2).sum(), (k, w))

    with rwkv_kernels.use_backend(compiled_backend):
        found = gradients(_wkv)
    _assert_all_close(found, gradients(reference.wkv))


def test_vmap_over_nothing_says_so(compiled_backend: str) -> None:
    w, u, k, v, _ = _inputs(compiled_backend)
    with rwkv_kernels.use_backend(compiled_backend):
        y = torch.vmap(lambda k: rwkv_kernels.wkv(w, u, k, v))(k.new_zeros(0, 2, 70, 5))
    assert y.shape == (0, 2, 70, 5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, compiled_backend: str) -> None:
    def gradients(function: Callable[..., Any]) -> list[Tensor | None]:
        leaves = [x.requires_grad_() for x in _inputs(compiled_backend)]
        _loss(function)(*leaves).backward()
        return [x.grad for x in leaves]

    with rwkv_kernels.use_backend(compiled_backend):
        found = gradients(lambda *x: checkpointed(_wkv, *x, use_reentrant=reentrant))
    _assert_all_close(found, gradients(reference.wkv))


def _run(function: Callable[[], None], in_thread: bool) -> None:
    """As autograd does on a GPU, in a thread that has made no choice of backend; its exceptions come back."""
    if in_thread:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(function).result()
    else:
        function()


def _nested(*inputs: Tensor) -> Any:
    """Three calls, one of them in a checkpoint in the checkpoint, and one in a separate block."""
    w, u, k, v, state = inputs
    y, state = _wkv(w, u, k, v, state)
    y, state = checkpointed(_wkv, w, u, y, v, state, use_reentrant=False)
    with rwkv_kernels.use_backend("cpu"):
        y, state = _wkv(w, u, k, y, state)
    return _wkv(w, u, y, k, state)


@pytest.mark.parametrize("in_thread", [False, True], ids=["same_thread", "other_thread"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [("reference", "auto"), ("cpu", "reference"), ("reference", "cpu"), (None, "reference")]
)
@pytest.mark.parametrize("function", [_wkv, _nested], ids=["one_call", "nested"])
def test_recomputation_takes_the_backend_of_its_forward(
    function: Callable[..., Any], before: str | None, after: str, reentrant: bool, in_thread: bool
) -> None:
    """With reentrant autograd it takes another, which the gradients of y cannot tell."""
    loss = (lambda function: lambda *x: (function(*x)[0] ** 2).sum()) if reentrant else _loss
    leaves = [x.requires_grad_() for x in _inputs("cpu")]
    with contextlib.nullcontext() if before is None else rwkv_kernels.use_backend(before):
        losses = [loss(lambda *x: checkpointed(function, *x, use_reentrant=reentrant))(*leaves) for _ in range(2)]

    def backward() -> None:
        with rwkv_kernels.use_backend(after):
            for each in losses:
                each.backward()
            assert registry.select("auto", leaves[2]).name == ("cpu" if after == "auto" else after)
        assert registry.select("auto", leaves[2]).name == "cpu"

    _run(backward, in_thread)
    expected = torch.autograd.grad(loss(function)(*leaves), leaves)
    _assert_all_close([x.grad for x in leaves], [2 * x for x in expected])


def test_a_checkpointed_model_trains_under_use_backend() -> None:
    torch.manual_seed(0)
    model, tokens = randomised(RWKV(11, 8, 2).double()), torch.randint(11, (2, 6))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens)[0].square().sum(), parameters)
    for block in model.blocks:
        block.forward = functools.partial(checkpointed, block.forward, use_reentrant=False)
    with rwkv_kernels.use_backend("reference"):
        loss = model(tokens)[0].square().sum()
    _run(loss.backward, in_thread=True)
    _assert_all_close([parameter.grad for parameter in parameters], expected)


def test_a_context_for_recomputation_is_still_the_callers() -> None:
    """`context_fn`, torch's own way, and hooks of another kind go together with it."""
    leaves = [x.requires_grad_() for x in _inputs("cpu")]

    def contexts() -> tuple[Any, Any]:
        return rwkv_kernels.use_backend("reference"), rwkv_kernels.use_backend("reference")

    loss = _loss(lambda *x: checkpointed(_wkv, *x, use_reentrant=False, context_fn=contexts))(*leaves)
    with rwkv_kernels.use_backend("reference"), torch.autograd.graph.save_on_cpu():
        loss = loss + _loss(_wkv)(*leaves)
    loss.backward()
    expected = torch.autograd.grad(_loss(_wkv)(*leaves), leaves)
    _assert_all_close([x.grad for x in leaves], [2 * x for x in expected])


def test_second_derivative_is_refused(compiled_backend: str) -> None:
    inputs = [x.requires_grad_() for x in _inputs(compiled_backend)]
    y = rwkv_kernels.wkv(*inputs, backend=compiled_backend)
    (gk,) = torch.autograd.grad(y.sum(), inputs[2], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative.*backend='reference'"):
        gk.pow(2).sum().backward()
    with rwkv_kernels.use_backend(compiled_backend), pytest.raises(NotImplementedError, match="second|forward-mode"):
        torch.func.jacrev(torch.func.jacrev(lambda k: _wkv(*inputs[:2], k, inputs[3])[0].sum()))(inputs[2].detach())


def test_forward_mode_is_refused(compiled_backend: str) -> None:
    w, u, k, v, _ = _inputs(compiled_backend)
    with rwkv_kernels.use_backend(compiled_backend):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative.*backend='reference'"):
            torch.func.jvp(lambda k: _wkv(w, u, k, v)[0], (k,), (k,))
        for grad_mode in (True, False):
            with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
                dual = torch.autograd.forward_ad.make_dual(k, k)
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    _wkv(w, u, dual, v)


def test_the_reference_differentiates_twice_and_forward() -> None:
    w, u, k, v, _ = _inputs("reference")
    k, v = k[:1, :4], v[:1, :4]

    def function(k: Tensor) -> Tensor:
        return rwkv_kernels.wkv(w, u, k, v, backend="reference")

    assert torch.autograd.gradgradcheck(function, k.clone().requires_grad_())
    assert torch.autograd.gradcheck(function, k.clone().requires_grad_(), check_forward_ad=True)


def test_autocast_joins_the_dtypes_of_k_and_v(compiled_backend: str) -> None:
    tensors = make(Problem())
    w, u, k, v, _ = tensors.inputs
    narrow = k.bfloat16()
    expected = rwkv_kernels.wkv(w, u, narrow.float(), v, backend=compiled_backend)
    with torch.autocast(k.device.type, dtype=torch.bfloat16):
        assert torch.equal(rwkv_kernels.wkv(w, u, narrow, v, backend=compiled_backend), expected)
        assert rwkv_kernels.wkv(w, u, narrow, v.bfloat16(), backend=compiled_backend).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="v: expected torch.bfloat16 as k"):
        rwkv_kernels.wkv(w, u, narrow, v, backend=compiled_backend)


def test_autocast_joins_the_dtypes_inside_the_operator_too(native_backend: str) -> None:
    w, u, k, v, _ = make(Problem()).inputs
    narrow = k.bfloat16()
    expected = rwkv_kernels.wkv(w, u, narrow.float(), v, backend=native_backend)
    with torch.autocast(k.device.type, dtype=torch.bfloat16):
        assert torch.equal(torch.ops.rwkv_kernels.wkv_forward(w, u, narrow, v, None, False)[0], expected)


@pytest.mark.parametrize("narrow", ["k", "v", "r", "k and v"])
def test_autocast_joins_the_dtypes_of_a_step(narrow: str, compiled_backend: str) -> None:
    w, u, k, v, state = make(Problem(T=2, with_state=True)).inputs
    assert state is not None
    token = {"k": k[:, 0], "v": v[:, 0], "r": v[:, 1]}
    token = {name: x.bfloat16() if name in narrow.split() else x for name, x in token.items()}
    found, expected = state.clone(), state.clone()
    with torch.autocast(k.device.type, dtype=torch.bfloat16):
        y = rwkv_kernels.wkv_step(w, u, token["k"], token["v"], found, r=token["r"], backend=compiled_backend)
    wide = {name: x.float() for name, x in token.items()}
    y_wide = rwkv_kernels.wkv_step(w, u, wide["k"], wide["v"], expected, r=wide["r"], backend=compiled_backend)
    assert torch.equal(y, y_wide) and torch.equal(found, expected)
    with pytest.raises(TypeError, match="expected torch.* as k"):
        rwkv_kernels.wkv_step(w, u, token["k"], token["v"], found, r=token["r"], backend=compiled_backend)


def test_a_model_decodes_under_autocast() -> None:
    torch.manual_seed(0)
    model, tokens = randomised(RWKV(11, 8, 2)), torch.randint(11, (2, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected, _ = model(tokens)
        state = model.empty_state(2)
        found = torch.stack([model.step(token, state) for token in tokens.unbind(1)], 1)
    # The two ways round a dozen intermediates to eight bits at different places.
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


class _Layer(torch.nn.Module):
    """Calls the operator as a user's layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (torch.nn.Parameter(torch.full((5,), value)) for value in (0.0, 1.0))

    def forward(self, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, state = rwkv_kernels.wkv(self.w, self.u, k, v, state, return_state=True)
        return 2 * y, rwkv_kernels.wkv(self.w, self.u, v, k), state


class _Step(_Layer):
    def forward(self, k: Tensor, v: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * rwkv_kernels.wkv_step(self.w, self.u, k, v, state, r=v)


def test_fx_traces_the_operator_as_one_node() -> None:
    layer = _Layer()
    traced = torch.fx.symbolic_trace(layer)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(rwkv_kernels.wkv) == 2
    _, _, *inputs = (x.float() for x in _inputs("cpu"))
    for found, expected in zip(traced(*inputs), layer(*inputs), strict=True):
        assert torch.equal(found, expected)
    traced(*inputs)[0].sum().backward()
    assert layer.w.grad is not None and layer.w.grad.abs().max() > 0

    step, (k, v, state) = _Step(), inputs
    stepped = torch.fx.symbolic_trace(step)
    states = state.clone(), state.clone()
    with torch.no_grad():
        assert torch.equal(stepped(k[:, 0], v[:, 0], states[0]), step(k[:, 0], v[:, 0], states[1]))
    assert torch.equal(*states) and not torch.equal(states[0], state)


def test_fx_traces_blocks_and_says_that_it_cannot_trace_a_model() -> None:
    block, x = Block(8, 16, 0, 2), torch.randn(2, 5, 8)
    state = RWKVState(torch.randn(2, 8), torch.randn(2, 8), rwkv_kernels.empty_state(2, 8))
    traced = torch.fx.symbolic_trace(block, concrete_args={"packing": None, "in_place": False})
    (y, after), (y_expected, after_expected) = traced(x, state), block(x, state)
    assert torch.equal(y, y_expected)
    assert all(torch.equal(a, b) for a, b in zip(after, after_expected, strict=True))
    with pytest.raises(TypeError, match=r"symbolic_trace cannot follow a whole model; torch\.export"):
        torch.fx.symbolic_trace(RWKV(11, 8, 2))
    with pytest.raises(TypeError, match=r"tokens: expected a torch\.Tensor, got list"):
        RWKV(11, 8, 2)([[1, 2]])


def test_meta_tensors_have_the_right_shapes(native_backend: str) -> None:
    inputs = [x.to("meta") for x in _inputs(native_backend)]
    y, state = _wkv(*inputs)
    assert y.device.type == "meta" and y.shape == (2, 70, 5) and state.shape == (2, 3, 5)


def test_inference_mode(compiled_backend: str) -> None:
    inputs = _inputs(compiled_backend)
    expected = rwkv_kernels.wkv(*inputs, backend=compiled_backend)
    with torch.inference_mode():
        assert torch.equal(rwkv_kernels.wkv(*inputs, backend=compiled_backend), expected)


def test_gradients_cost_at_most_1_3_times_a_plain_function(native_backend: str) -> None:
    """Of the same two kernels, without state, checks and a choice of backend: see benchmarks/latency.py."""
    calls = gradient_calls(native_backend)
    timers = [
        torch.utils.benchmark.Timer("call()", globals={"call": calls[what, "forward and backward"]})
        for what in ("wkv", PLAIN)
    ]
    ours, plain = math.inf, math.inf
    # The minimum of each, on a busy machine. Ten rounds before the first verdict, so that a slow sample of
    # the plain one cannot give it.
    for rounds in range(100):
        ours, plain = (min(least, timer.timeit(50).mean) for least, timer in zip((ours, plain), timers, strict=True))
        if rounds >= 10 and ours <= 1.3 * plain:
            return
    pytest.fail(f"{ours / plain:.2f} times")
