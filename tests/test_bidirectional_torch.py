"""The bidirectional operator under torch's transforms: compile, export, torch.func, autocast, checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bi_problems import Tensors, make
from problems import Problem
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint as checkpointed

import rwkv_kernels
from rwkv_kernels import reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
LENGTHS = (70, 3, 0, 66)
FORMS = {"plain": (False, None), "gated": (True, None), "packed": (False, LENGTHS), "gated_and_packed": (True, LENGTHS)}
forms = pytest.mark.parametrize("form", FORMS)


def _tensors(backend: str, form: str, T: int = 70, lengths: tuple[int, ...] | None = None) -> Tensors:
    gated, own_lengths = FORMS[form]
    lengths = own_lengths if own_lengths is None or lengths is None else lengths
    return make(Problem(T=T, C=5, gated=gated, lengths=lengths)).widest(backend)


def _leaves(tensors: Tensors) -> list[Tensor]:
    return [x.clone().detach().requires_grad_() for x in tensors.leaves().values()]


def _function(cu_seqlens: Tensor | None, oracle: bool = False) -> Callable[..., Tensor]:
    """bi_wkv, or its oracle, as a function of `_leaves`."""
    if oracle:
        return lambda log_decay, u, k, v, r=None: reference.bi_wkv(log_decay, u, k, v, r, cu_seqlens)
    return lambda log_decay, u, k, v, r=None: rwkv_kernels.bi_wkv(log_decay, u, k, v, r=r, cu_seqlens=cu_seqlens)


def _loss(y: Tensor) -> Tensor:
    return (y**2).sum() + y[..., 0].sum()


def _assert_all_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[b.dtype], atol=TOLERANCE[b.dtype])


@forms
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(form: str, requires_grad: bool) -> None:
    tensors = _tensors("cpu", form)
    leaves = [x.requires_grad_(requires_grad) for x in _leaves(tensors)]
    given = (*leaves[:4], leaves[4] if len(leaves) > 4 else None, tensors.cu_seqlens)
    forward, backward = torch.ops.rwkv_kernels.bi_wkv_forward, torch.ops.rwkv_kernels._bi_wkv_backward
    for checkpoint in (False, True):
        torch.library.opcheck(forward.default, (*given, checkpoint))
    with torch.no_grad():
        given = tuple(x if x is None else x.detach() for x in given)
        torch.library.opcheck(backward.default, (*given, forward(*given, True)[1], tensors.gy))


@forms
def test_compiles_once_for_all_lengths(form: str, compiled_bi_backend: str) -> None:
    def step(log_decay: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return rwkv_kernels.bi_wkv(log_decay, u, k, v, r=r, cu_seqlens=cu_seqlens)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    # Without boundaries, a graph for one interval is another one.
    calls = [(200, (30, 5, 7, 2, 1, 9, 8)), (321, (3, 0, 64, 1)), (150, (2, 2, 2, 2, 2, 2)), (700, (200, 1, 1))]
    for i, (T, lengths) in enumerate(calls):
        tensors = _tensors(compiled_bi_backend, form, T, lengths)
        leaves, exact = _leaves(tensors), _leaves(tensors)
        with (
            rwkv_kernels.use_backend(compiled_bi_backend),
            torch._dynamo.config.patch(error_on_recompile=i > 0),  # type: ignore[attr-defined]
        ):
            y = compiled(*leaves[:4], leaves[4] if len(leaves) > 4 else None, tensors.cu_seqlens)
            found = torch.autograd.grad(_loss(y), leaves)
        _assert_all_close(found, torch.autograd.grad(_loss(_function(tensors.cu_seqlens, oracle=True)(*exact)), exact))


def test_exports_with_dynamic_lengths(compiled_bi_backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, log_decay: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor, cu_seqlens: Tensor) -> Tensor:
            return rwkv_kernels.bi_wkv(log_decay, u, k, v, r=r, cu_seqlens=cu_seqlens)

    row, sequences = {1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
    tensors = _tensors(compiled_bi_backend, "gated_and_packed")
    assert tensors.r is not None and tensors.cu_seqlens is not None
    with rwkv_kernels.use_backend(compiled_bi_backend):
        given = (*tensors.inputs, tensors.r, tensors.cu_seqlens)
        program = torch.export.export(Module(), given, dynamic_shapes=({}, {}, row, row, row, sequences))
    others = _tensors(compiled_bi_backend, "gated_and_packed", lengths=(5, 130, 1))
    found = program.module()(*others.inputs, others.r, others.cu_seqlens)
    _assert_all_close([found], [reference.bi_wkv(*others.inputs, others.r, others.cu_seqlens)])


@forms
def test_func_grad(form: str, compiled_bi_backend: str) -> None:
    tensors = _tensors(compiled_bi_backend, form)
    leaves = [x.detach() for x in _leaves(tensors)]
    arguments = tuple(range(len(leaves)))
    with rwkv_kernels.use_backend(compiled_bi_backend):
        found = torch.func.grad(lambda *x: _loss(_function(tensors.cu_seqlens)(*x)), arguments)(*leaves)
    oracle = _function(tensors.cu_seqlens, oracle=True)
    _assert_all_close(found, torch.func.grad(lambda *x: _loss(oracle(*x)), arguments)(*leaves))


@pytest.mark.parametrize("form", ["gated", "gated_and_packed"])
@pytest.mark.parametrize("in_dims", [(None, None, 0, 0, 0), (0, None, 1, None, 3), (0, 0, 2, 2, None)])
def test_vmap_over_gradients(in_dims: tuple[int | None, ...], form: str, compiled_bi_backend: str) -> None:
    tensors = _tensors(compiled_bi_backend, form)
    leaves = [
        x.detach() if dim is None else torch.stack([x.detach(), x.detach() / 2], dim)
        for x, dim in zip(_leaves(tensors), in_dims, strict=True)
    ]

    def gradients(function: Callable[..., Tensor]) -> Any:
        return torch.vmap(torch.func.grad(lambda *x: _loss(function(*x)), (0, 2, 3, 4)), in_dims)(*leaves)

    with rwkv_kernels.use_backend(compiled_bi_backend):
        found = gradients(_function(tensors.cu_seqlens))
    _assert_all_close(found, gradients(_function(tensors.cu_seqlens, oracle=True)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, compiled_bi_backend: str) -> None:
    tensors = _tensors(compiled_bi_backend, "gated_and_packed")
    leaves, exact = _leaves(tensors), _leaves(tensors)
    with rwkv_kernels.use_backend(compiled_bi_backend):
        _loss(checkpointed(_function(tensors.cu_seqlens), *leaves, use_reentrant=reentrant)).backward()
    _loss(_function(tensors.cu_seqlens, oracle=True)(*exact)).backward()
    _assert_all_close([x.grad for x in leaves], [x.grad for x in exact])


def test_autocast_takes_the_widest_of_k_v_and_r(bi_backend: str) -> None:
    log_decay, u, k, v = make(Problem()).inputs
    narrow = torch.bfloat16
    calls = [(k.to(narrow), v.to(narrow), v), (k, v.to(narrow), v.to(narrow)), (k.to(narrow),) * 3]
    with torch.autocast(k.device.type, narrow):
        for (kt, vt, r), dtype in zip(calls, (torch.float32, torch.float32, narrow), strict=True):
            y = rwkv_kernels.bi_wkv(log_decay, u, kt, vt, r=r, backend=bi_backend)
            cast = (kt.to(dtype), vt.to(dtype))
            expected = rwkv_kernels.bi_wkv(log_decay, u, *cast, r=r.to(dtype), backend=bi_backend)
            assert y.dtype == dtype
            assert torch.equal(y, expected)
    with pytest.raises(TypeError, match="v: expected torch.bfloat16 as k, got torch.float32"):
        rwkv_kernels.bi_wkv(log_decay, u, k.to(narrow), v, backend=bi_backend)


def test_the_operator_itself_takes_autocast() -> None:
    log_decay, u, k, v = make(Problem()).inputs
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = torch.ops.rwkv_kernels.bi_wkv_forward(log_decay, u, k.bfloat16(), v, None, None, False)
    assert torch.equal(y, rwkv_kernels.bi_wkv(log_decay, u, k.bfloat16().float(), v, backend="cpu"))


def test_what_has_no_derivative_says_so(compiled_bi_backend: str) -> None:
    tensors = _tensors(compiled_bi_backend, "plain")
    leaves = _leaves(tensors)
    with rwkv_kernels.use_backend(compiled_bi_backend):
        (gk,) = torch.autograd.grad(_loss(_function(None)(*leaves)), leaves[2], create_graph=True)
        with pytest.raises(NotImplementedError, match="bi_wkv has no second derivative in its compiled backends"):
            gk.sum().backward()
        with pytest.raises(NotImplementedError, match="bi_wkv has no forward-mode derivative"):
            torch.func.jvp(_function(None), tuple(leaves), tuple(leaves))


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    tensors = _tensors("cpu", "gated_and_packed")
    real = rwkv_kernels.bi_wkv(*tensors.inputs, **tensors.options, backend="cpu")
    with FakeTensorMode() as mode:
        fake = tensors.changed(mode.from_tensor)
        y = rwkv_kernels.bi_wkv(*fake.inputs, **fake.options, backend="cpu")
    assert y.shape == real.shape and y.dtype == real.dtype
    meta = tensors.changed(lambda x: x.to("meta"))
    assert rwkv_kernels.bi_wkv(*meta.inputs, **meta.options, backend="cpu").shape == real.shape


def test_fx_traces_it_as_one_call() -> None:
    class Module(torch.nn.Module):
        def forward(self, log_decay: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rwkv_kernels.bi_wkv(log_decay, u, k, v, backend="cpu")

    graph = torch.fx.symbolic_trace(Module())
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [rwkv_kernels.bi_wkv]
    inputs = make(Problem()).inputs
    assert torch.equal(graph(*inputs), rwkv_kernels.bi_wkv(*inputs, backend="cpu"))
