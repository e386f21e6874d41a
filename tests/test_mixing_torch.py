"""The gate and packed sequences under torch's transforms: compile, export, torch.func, autocast, checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, Tensors, make, without_gauge
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

import rwkv_kernels
from rwkv_kernels import reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
LENGTHS = (70, 3, 0, 66)


def _tensors(backend: str, lengths: tuple[int, ...] | None = LENGTHS, gated: bool = True) -> Tensors:
    return make(Problem(T=70, C=5, gated=gated, lengths=lengths, with_state=True)).widest(backend)


def _leaves(tensors: Tensors) -> list[Tensor]:
    """w, u, k, v, state, and r where there is one."""
    return [x.detach().clone().requires_grad_() for x in (*tensors.inputs, tensors.r) if x is not None]


def _mixing(cu_seqlens: Tensor | None, function: Any = None) -> Callable[..., Any]:
    """wkv, or the oracle, as a function of `_leaves`."""
    if function is not None:
        return lambda w, u, k, v, state, r=None: function(w, u, k, v, state, r, cu_seqlens)
    return lambda w, u, k, v, state, r=None: rwkv_kernels.wkv(
        w, u, k, v, state, r=r, cu_seqlens=cu_seqlens, return_state=True
    )


def _loss(results: Any) -> Tensor:
    """A scalar of both results that respects the state's gauge."""
    y, state = results
    return (y**2).sum() + (state[:, 0] / state[:, 1]).sum() + (state[:, 2] + state[:, 1].log()).sum()


def _assert_all_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[b.dtype], atol=TOLERANCE[b.dtype])


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["gated", "gated_and_packed"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(lengths: tuple[int, ...] | None, requires_grad: bool, operators: Any) -> None:
    tensors = _tensors(operators.backend, lengths)
    *inputs, r = (x.requires_grad_(requires_grad) for x in _leaves(tensors))
    prefix = operators.forward._schema.name.split("::")[1].removesuffix("_forward")
    forward = getattr(torch.ops.rwkv_kernels, f"{prefix}_mixing_forward").default
    backward = getattr(torch.ops.rwkv_kernels, f"_{prefix}_mixing_backward").default
    torch.library.opcheck(forward, (*inputs, r, tensors.cu_seqlens, False))
    if lengths is None:  # of a packed call, some rows of the checkpoints belong to no sequence
        torch.library.opcheck(forward, (*inputs, r, None, True))
    with torch.no_grad():
        given = (*(x.detach() for x in (*inputs, r)), tensors.cu_seqlens)
        _, after, checkpoints = forward(*given, True)
        torch.library.opcheck(backward, (*given, checkpoints, tensors.gy, after))


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_once_for_all_lengths(gated: bool, compiled_backend: str) -> None:
    def step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None, cu_seqlens: Tensor) -> Any:
        return rwkv_kernels.wkv(w, u, k, v, state, r=r, cu_seqlens=cu_seqlens, return_state=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for i, lengths in enumerate([(30, 5, 7, 2, 1, 9, 8), (3, 0, 64, 1), (2, 2, 2, 2, 2, 2), (200, 1, 1)]):
        tensors = _tensors(compiled_backend, lengths, gated)
        leaves, exact = _leaves(tensors), _leaves(tensors)
        with (
            rwkv_kernels.use_backend(compiled_backend),
            torch._dynamo.config.patch(error_on_recompile=i > 0),  # type: ignore[attr-defined]
        ):
            r = leaves[5] if gated else None
            found = torch.autograd.grad(_loss(compiled(*leaves[:5], r, tensors.cu_seqlens)), leaves)
        expected = _loss(_mixing(tensors.cu_seqlens, reference.wkv)(*exact))
        _assert_all_close(found, torch.autograd.grad(expected, exact))


def test_exports_with_dynamic_lengths(compiled_backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor, cu: Tensor) -> Any:
            return rwkv_kernels.wkv(w, u, k, v, state, r=r, cu_seqlens=cu, return_state=True)

    row, sequences = {1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
    tensors = _tensors(compiled_backend)
    assert tensors.r is not None and tensors.cu_seqlens is not None
    with rwkv_kernels.use_backend(compiled_backend):
        program = torch.export.export(
            Module(),
            (*tensors.inputs, tensors.r, tensors.cu_seqlens),
            dynamic_shapes=({}, {}, row, row, sequences, row, sequences),
        )
    others = _tensors(compiled_backend, (5, 130, 1))
    found = program.module()(*others.inputs, others.r, others.cu_seqlens)
    expected = reference.wkv(*others.inputs, others.r, others.cu_seqlens)
    _assert_all_close(without_gauge(*found), without_gauge(*expected))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["gated", "gated_and_packed"])
def test_func_grad(lengths: tuple[int, ...] | None, compiled_backend: str) -> None:
    tensors = _tensors(compiled_backend, lengths)
    leaves, arguments = [x.detach() for x in _leaves(tensors)], tuple(range(6))
    with rwkv_kernels.use_backend(compiled_backend):
        found = torch.func.grad(lambda *x: _loss(_mixing(tensors.cu_seqlens)(*x)), arguments)(*leaves)
    expected = torch.func.grad(lambda *x: _loss(_mixing(tensors.cu_seqlens, reference.wkv)(*x)), arguments)(*leaves)
    _assert_all_close(found, expected)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["gated", "gated_and_packed"])
@pytest.mark.parametrize("in_dims", [(None, None, 0, 0, None, 0), (0, None, 1, None, 2, 3)])
def test_vmap_over_gradients(
    in_dims: tuple[int | None, ...], lengths: tuple[int, ...] | None, compiled_backend: str
) -> None:
    tensors = _tensors(compiled_backend, lengths)
    leaves = [
        x.detach() if dim is None else torch.stack([x.detach(), x.detach() / 2], dim)
        for x, dim in zip(_leaves(tensors), in_dims, strict=True)
    ]

    def gradients(function: Callable[..., Any]) -> Any:
        return torch.vmap(torch.func.grad(lambda *x: _loss(function(*x)), (0, 2, 4, 5)), in_dims)(*leaves)

    with rwkv_kernels.use_backend(compiled_backend):
        found = gradients(_mixing(tensors.cu_seqlens))
    _assert_all_close(found, gradients(_mixing(tensors.cu_seqlens, reference.wkv)))


def test_vmap_over_boundaries_is_refused(compiled_backend: str) -> None:
    tensors = _tensors(compiled_backend)
    assert tensors.cu_seqlens is not None
    boundaries = torch.stack([tensors.cu_seqlens, tensors.cu_seqlens])
    with (
        rwkv_kernels.use_backend(compiled_backend),
        pytest.raises(NotImplementedError, match="cu_seqlens: vmap over boundaries"),
    ):
        torch.vmap(lambda cu: rwkv_kernels.wkv(*tensors.inputs, cu_seqlens=cu))(boundaries)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, compiled_backend: str) -> None:
    tensors = _tensors(compiled_backend)
    leaves, exact = _leaves(tensors), _leaves(tensors)
    with rwkv_kernels.use_backend(compiled_backend):
        _loss(checkpointed(_mixing(tensors.cu_seqlens), *leaves, use_reentrant=reentrant)).backward()
    _loss(_mixing(tensors.cu_seqlens, reference.wkv)(*exact)).backward()
    _assert_all_close([x.grad for x in leaves], [x.grad for x in exact])


def test_autocast_takes_the_widest_of_k_v_and_r(backend: str) -> None:
    w, u, k, v, _ = make(Problem()).inputs
    narrow = torch.bfloat16
    calls = [(k.to(narrow), v.to(narrow), v), (k, v.to(narrow), v.to(narrow)), (k.to(narrow),) * 3]
    with torch.autocast(k.device.type, narrow):
        for (kt, vt, r), dtype in zip(calls, (torch.float32, torch.float32, narrow), strict=True):
            y = rwkv_kernels.wkv(w, u, kt, vt, r=r, backend=backend)
            expected = rwkv_kernels.wkv(w, u, kt.to(dtype), vt.to(dtype), r=r.to(dtype), backend=backend)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="r: expected torch.bfloat16 as k, got torch.float32"):
        rwkv_kernels.wkv(w, u, k.to(narrow), v.to(narrow), r=v, backend=backend)


def test_the_plain_call_is_still_the_plain_operator(native_backend: str) -> None:
    """A graph that was saved with it runs, and so does one without either argument."""
    tensors = _tensors(native_backend, None)

    class Module(torch.nn.Module):
        def forward(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rwkv_kernels.wkv(w, u, k, v)

    program = torch.export.export(Module(), tensors.inputs[:4])
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.rwkv_kernels.wkv_forward.default in called
    assert torch.ops.rwkv_kernels.wkv_mixing_forward.default not in called


def test_the_direct_operator_refuses_bad_boundaries_before_it_writes() -> None:
    tensors = _tensors("cpu")
    w, u, k, v = tensors.inputs[:4]
    for bad, message in (
        (torch.tensor([1, 139]), "start at 0"),
        (torch.tensor([0, 140]), "end at 139"),
        (torch.tensor([0, 100, 50, 139]), "rise"),
        (torch.tensor([0.0, 139.0]), "int32 or int64"),
    ):
        with pytest.raises(RuntimeError, match=f"cu_seqlens: .*{message}"):
            torch.ops.rwkv_kernels.wkv_mixing_forward(w, u, k, v, None, tensors.r, bad, True)
