"""The operators on DTensors: every layout, forward and backward, against plain tensors."""

import itertools
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Problem, Tensors, make
from processes import run_python
from ranks import error_of, on_ranks
from torch import Tensor

from rwkv_kernels import bi_wkv, native, shardings, wkv, wkv_step
from rwkv_kernels.distributed import register_shardings

pytestmark = pytest.mark.skipif(
    native.operators.why_missing is not None or not dist.is_available(), reason="needs the library and gloo"
)

B, C = 4, 8
PLAIN = Problem(B=B, T=70, C=C, with_state=True)
GATED = Problem(B=B, T=70, C=C, with_state=True, gated=True)
PACKED = Problem(C=C, lengths=(30, 0, 9), with_state=True, gated=True)


def placements(layout: str, name: str) -> Any:
    """Of an argument, where a dimension of the mesh has the layout."""
    from torch.distributed.tensor import Replicate, Shard

    cut = {
        "replicated": {},
        "batch": {"sequence": 0, "state": 0},
        "channels": {"parameter": 0, "sequence": 2, "state": 2},
    }
    kind = {"w": "parameter", "u": "parameter", "state": "state"}.get(name, "sequence")
    dimension = cut[layout].get(kind)
    return Replicate() if dimension is None else Shard(dimension)


def named(tensors: Tensors) -> dict[str, Tensor]:
    names = ("w", "u", "k", "v", "state", "r")
    return {name: getattr(tensors, name) for name in names if getattr(tensors, name) is not None}


def check(mesh: Any, problem: Problem, layouts: dict[str, tuple[str, ...]], expected: tuple[str, ...] | None) -> None:
    """Compares outputs and all gradients; `layouts` has those of each argument, one for each dimension of the mesh."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    tensors = make(problem, torch.float64)
    given, whole = named(tensors), {}
    for name, x in given.items():
        placed = distribute_tensor(x, mesh, [placements(layout, name) for layout in layouts[name]])
        whole[name] = placed.detach().requires_grad_()
    options = {}
    if tensors.cu_seqlens is not None:
        options["cu_seqlens"] = DTensor.from_local(tensors.cu_seqlens, mesh, [Replicate()] * mesh.ndim)
    outputs = wkv(**whole, **options, return_state=True)
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    plain = wkv(**leaves, cu_seqlens=tensors.cu_seqlens, return_state=True)
    for name, x, y in zip(("y", "state"), outputs, plain, strict=True):
        if expected is not None:
            assert x.placements == tuple(placements(layout, name) for layout in expected), (name, layouts)
        torch.testing.assert_close(x.full_tensor(), y)
    loss = sum((x.full_tensor() * y).sum() for x, y in zip(outputs, (tensors.gy, tensors.gstate), strict=True))
    gradients = torch.autograd.grad(loss, list(whole.values()))
    loss = sum((x * y).sum() for x, y in zip(plain, (tensors.gy, tensors.gstate), strict=True))
    for x, y in zip(gradients, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(x.full_tensor(), y)


def check_layouts() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))
    names = ("w", "u", "k", "v", "state", "r")
    for layout in shardings.LAYOUTS:
        for problem in (PLAIN, GATED, PACKED):
            if problem is not PACKED or layout != "batch":
                check(mesh["one"], problem, dict.fromkeys(names, (layout,)), (layout,))
    for pair in itertools.product(shardings.LAYOUTS, repeat=2):
        check(mesh, GATED, dict.fromkeys(names, pair), pair)
    # Torch moves what is placed in another way than the rest.
    for problem in (PLAIN, GATED):
        mixed = dict.fromkeys(names, ("channels",)) | {"k": ("batch",), "u": ("replicated",)}
        check(mesh["one"], problem, mixed, None)
    check(mesh["one"], PACKED, dict.fromkeys(names, ("channels",)) | {"state": ("batch",)}, None)


def test_every_layout_gives_the_results_of_plain_tensors_and_keeps_them_where_they_are() -> None:
    on_ranks(4, check_layouts)


def check_bidirectional() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for layout, problem in itertools.product(shardings.LAYOUTS, (GATED, PACKED)):
        if problem is PACKED and layout == "batch":
            continue
        tensors = make(problem, torch.float64)
        given = named(tensors)
        del given["state"]
        given["w"] = -given["w"].exp()
        plain = [x.clone().requires_grad_() for x in given.values()]
        whole = [distribute_tensor(x, mesh, [placements(layout, name)]).requires_grad_() for name, x in given.items()]
        boundaries = None
        if tensors.cu_seqlens is not None:
            boundaries = DTensor.from_local(tensors.cu_seqlens, mesh, [Replicate()])
        y = bi_wkv(*whole[:4], r=whole[4], cu_seqlens=boundaries)
        expected = bi_wkv(*plain[:4], r=plain[4], cu_seqlens=tensors.cu_seqlens)
        assert y.placements == (placements(layout, "y"),), layout
        torch.testing.assert_close(y.full_tensor(), expected)
        gradients = torch.autograd.grad((y.full_tensor() * tensors.gy).sum(), whole)
        for x, z in zip(gradients, torch.autograd.grad(expected, plain, tensors.gy), strict=True):
            torch.testing.assert_close(x.full_tensor(), z)


def test_the_bidirectional_operator_has_the_same_layouts() -> None:
    on_ranks(2, check_bidirectional)


def check_steps() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))
    tensors = make(Problem(B=B, T=1, C=C, with_state=True, gated=True))
    token = {name: x[:, 0] if name in ("k", "v", "r") else x for name, x in named(tensors).items()}

    def placed(mesh: Any, layouts: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
        def of(name: str, x: Tensor) -> list[Any]:
            found = [placements(layout, name) for layout in layouts[name]]
            return [type(p)(1) if name in ("k", "v", "r") and getattr(p, "dim", 0) == 2 else p for p in found]

        return {name: distribute_tensor(x.clone(), mesh, of(name, x)) for name, x in token.items()}

    every = [(meshes["one"], (layout,)) for layout in shardings.LAYOUTS]
    every += [(meshes, pair) for pair in itertools.product(shardings.LAYOUTS, repeat=2)]
    for gated, (mesh, layouts) in itertools.product((False, True), every):
        given = placed(mesh, dict.fromkeys(token, layouts))
        whole = {name: x.clone() for name, x in token.items()}
        if not gated:
            del given["r"], whole["r"]
        y = wkv_step(**given)
        torch.testing.assert_close(y.full_tensor(), wkv_step(**whole))
        assert y.placements == given["k"].placements
        torch.testing.assert_close(given["state"].full_tensor(), whole["state"])
    for one, other in itertools.permutations(shardings.LAYOUTS, 2):
        for mesh, fits, odd in ((meshes["one"], (one,), (other,)), (meshes, (one, one), (one, other))):
            given = placed(mesh, dict.fromkeys(token, fits) | {"state": odd})
            before = given["state"].full_tensor()
            assert re.match(r"\w+: \w+: expected .* because wkv_step leaves the state", error_of(wkv_step, **given))
            assert torch.equal(given["state"].full_tensor(), before)
    given = placed(meshes["one"], dict.fromkeys(token, ("batch",)))
    given["state"] = distribute_tensor(token["state"], meshes["one"], [Shard(1)])
    assert "state: expected it replicated or cut over B or C" in error_of(wkv_step, **given)


def test_a_step_moves_the_state_where_it_is_or_is_refused() -> None:
    on_ranks(4, check_steps)


def check_time() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    w, u, k, v, _ = make(Problem(B=B, T=6, C=C)).inputs
    parameters = [distribute_tensor(x, mesh, [Replicate()]) for x in (w, u)]
    cut = [distribute_tensor(x, mesh, [Shard(1)]) for x in (k, v)]
    assert "k: expected every device to have all steps" in error_of(wkv, *parameters, *cut)
    assert "mixed torch.Tensor and DTensor" in error_of(wkv, w, u, *cut)


def test_steps_that_are_spread_over_devices_are_refused() -> None:
    on_ranks(2, check_time)


def check_compiled() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    w, u, k, v, _ = make(Problem(B=B, T=6, C=C)).inputs
    given = [distribute_tensor(x, mesh, [Replicate()]) for x in (w, u)]
    given += [distribute_tensor(x, mesh, [Shard(0)]) for x in (k, v)]
    leaves = [x.detach().requires_grad_() for x in given]
    compiled = torch.compile(lambda *x: wkv(*x).square(), backend="aot_eager", fullgraph=True)
    y = compiled(*leaves)
    y.full_tensor().sum().backward()
    plain = [x.clone().requires_grad_() for x in (w, u, k, v)]
    expected = wkv(*plain).square()
    expected.sum().backward()
    torch.testing.assert_close(y.full_tensor(), expected)
    for x, z in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), z.grad)


def test_compiled_graphs_have_the_shardings() -> None:
    on_ranks(2, check_compiled)


def test_every_operator_of_the_package_has_a_strategy_that_registers_once() -> None:
    from torch.distributed.tensor import DTensor

    register_shardings()
    register_shardings()
    known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    operators = getattr(torch.ops, native.NAMESPACE)
    for name in ("wkv_forward", "wkv_mixing_forward", "bi_wkv_forward"):
        assert getattr(operators, name).default in known
        assert getattr(operators, f"_{name.replace('forward', 'backward')}").default in known
    assert operators.wkv_step.default in known


def test_nothing_is_imported_or_registered_before_a_dtensor_comes() -> None:
    call = "rwkv_kernels.wkv(x[0, 0], x[0, 0], x, x)"
    code = f"""
import sys, torch, rwkv_kernels
from rwkv_kernels import shardings
x = torch.nn.Parameter(torch.ones(1, 1, 1))
{call}
print("torch.distributed.tensor" in sys.modules)
import torch.distributed.tensor
{call}
print(shardings.register.cache_info().currsize)
"""
    assert run_python(code).split() == ["False", "0"]
