"""The model over a mesh of devices: by its channels, its context, its data and two of these, against one process."""

import copy
import functools
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import V, leaf_state, loss_up_to_gauge, rwkv
from ranks import error_of, gathered, on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_kernels import native
from rwkv_kernels.nn import RWKV, RWKVState

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import parallelize_module

    from rwkv_kernels.distributed import context_parallel, parallelize, tensor_parallel_plan

pytestmark = pytest.mark.skipif(
    native.operators.why_missing is not None or not dist.is_available(), reason="needs the library and gloo"
)

B, T = 4, 21
Gradients = dict[str, Tensor]


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def whole_state(state: RWKVState) -> RWKVState:
    return RWKVState(*(x.full_tensor() if isinstance(x, DTensor) else x for x in state))


def tokens_of(batch: int = B) -> Tensor:
    return torch.randint(V, (batch, T + 1), generator=torch.Generator().manual_seed(1))


def mean_loss(model: RWKV, tokens: Tensor) -> Tensor:
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())


def gradients_of(model: RWKV) -> Gradients:
    return {name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}


def assert_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = (found[name].double() - x).norm() / x.norm()
        assert error < tolerance, f"{name}: {error}"


def one_process(model: RWKV) -> Gradients:
    plain = copy.deepcopy(model)
    mean_loss(plain, tokens_of()).backward()
    return gradients_of(plain)


# ---- by channels ----


def check_channels() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    tokens = tokens_of()
    plain = rwkv()
    cut = parallelize_module(rwkv(), mesh, tensor_parallel_plan())
    local = cut.blocks[0].att.time_decay.to_local().shape
    assert local[0] * dist.get_world_size() == plain.blocks[0].att.time_decay.shape[0]
    state = leaf_state(plain, B)
    losses, results = [], []
    for model in (plain, cut):
        for given in (None, RWKVState(*(x.detach().clone() for x in state))):
            logits, after = model(tokens[:, :-1], given)
            # Two calls more: the state comes back as it is returned.
            more, after = model(tokens[:, :5], after)
            results.append((logits, more, *whole_state(after)))
            losses.append(loss_up_to_gauge(logits, whole_state(after)))
        losses[-1].backward(inputs=list(model.parameters()))
    for found, expected in zip(results[2:], results[:2], strict=True):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert_same(gradients_of(cut), gradients_of(plain), 1e-12)
    for communication, calls, of_layers in (
        # Beside the layers: the embedding and the head.
        (lambda: cut(tokens)[0], [], {"all_reduce": 1 + 1 * 3, "reduce_scatter": 3, "all_gather": 1 + 3}),
        (lambda y: y.sum().backward(), [cut(tokens)[0]], {"all_reduce": 1 + 5 * 3, "all_gather": 3}),
    ):
        with CommDebugMode() as mode:
            communication(*calls)
        counts = {str(name).split(".")[-1]: count for name, count in mode.get_comm_counts().items()}
        assert {re.sub("_(tensor|into_tensor)$", "", name): count for name, count in counts.items()} == of_layers
    with torch.no_grad():
        assert torch.equal(cut.generate(tokens, 4, temperature=0), plain.generate(tokens, 4, temperature=0))


def test_a_model_whose_channels_are_spread_equals_one_process() -> None:
    on_ranks(2, check_channels)


# ---- by context ----


def part(x: Tensor, steps: list[int], rank: int) -> Tensor:
    return x.split(steps, 1)[rank]


def check_context() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    plain, tokens = rwkv(), tokens_of()[:, :-1]
    given = leaf_state(plain, B)
    for steps in ([8, 8, 5], [0, 20, 1], [20, 1, 0]):
        for start in (None, given):
            plain.zero_grad()
            logits, after = plain(tokens, start)
            loss_up_to_gauge(logits, after).backward(inputs=list(plain.parameters()))
            cut = context_parallel(rwkv())
            # Other ranks' states are not looked at.
            own, own_after = cut(part(tokens, steps, rank), start if rank == 0 else None)
            torch.testing.assert_close(own, part(logits, steps, rank))
            for name, x, y in zip(after._fields, own_after, after, strict=True):
                if name != "wkv":
                    torch.testing.assert_close(x, y)
            mean, expected = (x.wkv[:, :, 0] / x.wkv[:, :, 1] for x in (own_after, after))
            torch.testing.assert_close(mean, expected)
            nothing = RWKVState(*(torch.zeros_like(x) for x in own_after))
            of_state = loss_up_to_gauge(own[:, :0], own_after) / ranks
            (loss_up_to_gauge(own, nothing) + of_state).backward(inputs=list(cut.parameters()))
            shares = gathered(gradients_of(cut))
            sums = {name: torch.stack([share[name] for share in shares]).sum(0) for name in shares[0]}
            assert_same(sums, gradients_of(plain), 1e-11)


def check_refusals() -> None:
    rank = dist.get_rank()
    model, tokens = context_parallel(rwkv()), tokens_of()
    state = leaf_state(rwkv(), B)
    coarse = state._replace(wkv=state.wkv.to(torch.bfloat16))
    odd = rank == 1
    for said, error in (
        (error_of(model, tokens, attention_mask=torch.ones_like(tokens) if odd else None), "attention_mask: not supp"),
        (error_of(model, tokens, last_only=odd), "last_only: not supported"),
        (error_of(model, tokens.float() if odd else tokens), "tokens: expected torch.int64"),
        (error_of(model, tokens, coarse if odd else state), "too coarse"),
    ):
        assert error in said if odd else "RuntimeError: rank 1 refused their arguments" in said, said
    assert "B: expected the same" in error_of(model, tokens[:1] if odd else tokens)
    assert "in_place: not supported" in error_of(model.step, tokens[:, 0], state)
    assert error_of(model, tokens) == ""


def check_context_and_refusals() -> None:
    check_context()
    check_refusals()


def test_a_model_whose_context_is_spread_equals_one_process() -> None:
    on_ranks(3, check_context_and_refusals)


# ---- meshes ----


def own_part(tokens: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """This rank's inputs and targets: sequences by "data", steps by "context"."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    names = mesh.mesh_dim_names or ()
    for dimension, name in enumerate(("data", "context")):
        if name in names:
            parts = (x.tensor_split(mesh[name].size(), dimension) for x in (inputs, targets))
            inputs, targets = (x[mesh.get_local_rank(name)] for x in parts)
    return inputs, targets


def check_mesh(sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    tokens, plain = tokens_of(), rwkv()
    expected = one_process(plain)
    ranks = dist.get_world_size() // (mesh["tensor"].size() if "tensor" in names else 1)

    def train(model: RWKV) -> Gradients:
        inputs, targets = own_part(tokens, mesh)
        logits, _ = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum")
        (loss * ranks / tokens[:, 1:].numel()).backward()
        return gradients_of(model)

    assert_same(train(parallelize(rwkv(), mesh)), expected, 1e-12)
    again = parallelize(rwkv(), mesh)
    for block in again.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    assert_same(train(again), expected, 1e-12)
    if "tensor" not in names or len(names) > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        half = parallelize(rwkv(torch.float32), mesh, mp_policy=policy)
        assert_same(train(half), expected, 0.1)
        logits, state = half(own_part(tokens, mesh)[0])
        assert logits.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32
        # A state stays float32 where it is passed on.
        half(own_part(tokens, mesh)[0], state)


def check_names() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    assert "the last two not together" in error_of(parallelize, rwkv(), mesh)
    other = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    assert "expected dimensions named data, context or tensor" in error_of(parallelize, rwkv(), other)
    assert "got None" in error_of(parallelize, rwkv(), init_device_mesh("cpu", (4,)))


MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "data": ((2,), ("data",)),
    "context": ((2,), ("context",)),
    "tensor": ((2,), ("tensor",)),
    "data x context": ((2, 2), ("data", "context")),
    "data x tensor": ((2, 2), ("data", "tensor")),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_model_over_a_mesh_has_the_gradients_of_one_process(mesh: str) -> None:
    sizes, names = MESHES[mesh]
    on_ranks(functools.reduce(lambda a, b: a * b, sizes), check_mesh, sizes, names)


def test_a_mesh_that_cannot_be_is_refused() -> None:
    on_ranks(4, check_names)
