"""The operator and the token shift over slices of a sequence, against one process."""

import contextlib
import functools
import io
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import MIXING_PROBLEMS, PROBLEMS, Problem, Tensors, assert_close, log_denominator, make, solve
from processes import run_python
from ranks import error_of, gathered, on_ranks
from torch import Tensor

import rwkv_kernels
from rwkv_kernels import distributed, native
from rwkv_kernels.distributed import ranks as module
from rwkv_kernels.inputs import DTYPES

pytestmark = pytest.mark.skipif(
    native.operators.why_missing is not None or not dist.is_available(), reason="needs the library and gloo"
)

NAMES = (
    "small_with_state",
    "two_checkpoints_and_one",
    "no_decay",
    "strong_decay",
    "decay_of_10000",
    "u_of_plus_1000",
    "k_of_20_and_u_of_minus_25",
    "k_of_1000",
    "time_major",
    "gated",
)
CASES = {name: (PROBLEMS | MIXING_PROBLEMS)[name] for name in NAMES}


def slices(T: int, ranks: int) -> list[int]:
    """Unequal ones."""
    first = T // (2 * ranks) + 1
    return [first] * (ranks - 1) + [T - first * (ranks - 1)]


def part(x: Tensor, steps: list[int]) -> Tensor:
    return x.split(steps, 1)[dist.get_rank()]


def solve_slices(tensors: Tensors, steps: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """The results of `solve`, and the final state; each rank has a share in the gradient that arrives at that state."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    given = {name: getattr(tensors, name) for name in ("w", "u", "k", "v", "state", "r")}
    own = {
        name: part(x, steps) if x.dim() == 3 and name != "state" else x for name, x in given.items() if x is not None
    }
    leaves = {name: x.detach().requires_grad_() for name, x in own.items()}
    y, state = distributed.wkv(**leaves, return_state=True)
    change = torch.exp(state[:, 2].detach() - log_denominator(state.detach()))
    share = 2 * (rank + 1) / (ranks * (ranks + 1))
    loss = (y.double() * part(tensors.gy, steps)).sum()
    loss = loss + share * (state[:, :2].double() * (change[:, None] * tensors.gstate[:, :2])).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    assert gradients.get("state") is None or rank == 0
    found = gathered({"y": y.detach(), **{f"g{name}": x for name, x in gradients.items()}})
    results = {"state_mean": state[:, 0] / state[:, 1], "state_log_den": log_denominator(state)}
    for name in found[0]:
        parts = [rank[name] for rank in found]
        if name in ("gw", "gu"):
            results[name] = torch.stack(parts).double().sum(0)
        else:
            results[name] = parts[0] if name == "gstate" else torch.cat(parts, 1)
    return {name: x.detach() for name, x in results.items()}, state.detach()


def check_slices(tensors: Tensors, steps: list[int], name: str) -> None:
    found, state = solve_slices(tensors, steps)
    if dist.get_rank() == 0:
        exact = solve(tensors.exact(), "reference", log_denominator(state.double()))
        assert_close(found, exact, tensors, f"{name} {steps} ")


def check_problems(dtype: torch.dtype) -> None:
    ranks = dist.get_world_size()
    for name, problem in CASES.items():
        check_slices(make(problem, dtype), slices(problem.T, ranks), name)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_outputs_and_gradients_equal_those_of_one_process(dtype: torch.dtype, ranks: int) -> None:
    on_ranks(ranks, check_problems, dtype)


def check_float64() -> None:
    for problem in (Problem(T=90, gated=True, with_state=True), Problem(B=1, T=700, C=3, log_decay=-1e-3)):
        tensors = make(problem, torch.float64)
        found, state = solve_slices(tensors, slices(problem.T, 3))
        for name, expected in solve(tensors, "cpu", log_denominator(state)).items():
            error = (found[name] - expected).norm() / expected.norm()
            assert error < 1e-12, f"{name}: {error}"


def test_float64_equals_one_process_to_twelve_digits() -> None:
    on_ranks(3, check_float64)


def check_empty_slices() -> None:
    for steps in ([0, 30, 7], [30, 0, 7], [30, 7, 0], [0, 0, 37], [37, 0, 0]):
        check_slices(make(Problem(T=37, gated=True, with_state=True)), steps, "empty slices")
        check_slices(make(Problem(T=37), torch.float64), steps, "empty slices")
    tensors = make(Problem(T=0, with_state=True))
    y, state = distributed.wkv(*tensors.inputs, return_state=True)
    assert y.shape[1] == 0
    torch.testing.assert_close(state, tensors.state, rtol=1e-6, atol=0)


def test_a_rank_may_have_no_steps() -> None:
    on_ranks(3, check_empty_slices)


def check_repetition() -> None:
    tensors = make(Problem(T=100, C=64, gated=True, with_state=True))
    steps = slices(100, 3)
    first, state = solve_slices(tensors, steps)
    again, _ = solve_slices(tensors, steps)
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert all(torch.equal(state, other) for other in gathered(state))


def test_results_repeat_bit_for_bit_and_the_final_state_is_the_same_on_every_rank() -> None:
    on_ranks(3, check_repetition)


def check_segments() -> None:
    tensors = make(Problem(T=60, with_state=True), torch.float64)
    w, u, k, v, state = tensors.inputs
    assert state is not None
    expected, _ = rwkv_kernels.wkv(w, u, k, v, state, return_state=True)
    for piece in (slice(0, 40), slice(40, 60)):
        own_k, own_v = (part(x[:, piece], slices(x[:, piece].shape[1], 3)) for x in (k, v))
        y, state = distributed.wkv(w, u, own_k, own_v, state, return_state=True)
        torch.testing.assert_close(torch.cat(gathered(y), 1), expected[:, piece])


def test_the_state_continues_the_sequence_in_the_next_call() -> None:
    on_ranks(3, check_segments)


def check_one_that_requires_a_gradient() -> None:
    tensors = make(Problem(T=30), torch.float64)
    w, u, k, v, _ = tensors.inputs
    steps = [10, 10, 10]
    own_k, own_v = part(k, steps).clone(), part(v, steps)
    if dist.get_rank() == 1:
        own_k.requires_grad_()
    distributed.wkv(w, u, own_k, own_v).sum().backward()
    if dist.get_rank() == 1:
        k = k.requires_grad_()
        rwkv_kernels.wkv(w, u, k, v).sum().backward()
        torch.testing.assert_close(own_k.grad, part(k.grad, steps))


def test_all_ranks_take_part_in_backward_where_one_requires_a_gradient() -> None:
    on_ranks(3, check_one_that_requires_a_gradient)


# ---- the token shift ----


def check_shift() -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    for steps in ([5, 6, 1], [0, 7, 5], [7, 0, 5], [7, 5, 0], [0, 0, 12]):
        x, before, gy, glast = normal(2, 12, 4), normal(2, 4), normal(2, 12, 4), normal(2, 4)
        whole = torch.cat((before.unsqueeze(1), x), 1)
        own, first = part(x, steps).clone().requires_grad_(), before.clone().requires_grad_()
        previous, last = distributed.token_shift(own, first, return_last=True)
        assert torch.equal(previous, part(whole[:, :-1], steps)) and torch.equal(last, whole[:, -1])
        loss = (previous * part(gy, steps)).sum() + (last * glast).sum() / 3
        gx, gbefore = torch.autograd.grad(loss, (own, first), allow_unused=True)
        expected = torch.cat((gy, glast.unsqueeze(1)), 1)
        torch.testing.assert_close(gx, part(expected[:, 1:], steps))
        if dist.get_rank() == 0:
            torch.testing.assert_close(gbefore, expected[:, 0])
    x = part(normal(2, 12, 4), [4, 4, 4])
    previous = distributed.token_shift(x, group=dist.group.WORLD)
    assert dist.get_rank() > 0 or not previous[:, 0].any()


def test_the_token_shift_looks_across_ranks() -> None:
    on_ranks(3, check_shift)


# ---- what cannot be ----


def check_disagreements() -> None:
    rank = dist.get_rank()
    w, u, k, v, _ = make(Problem(T=10)).inputs
    odd = rank == 2

    def call(k: Tensor, v: Tensor, **options: Any) -> str:
        return error_of(distributed.wkv, w[: k.shape[2]], u[: k.shape[2]], k, v, **options)

    for said, message in (
        (call(k[:1] if odd else k, v[:1] if odd else v), "B: .*got 2 on ranks 0, 1; 1 on rank 2"),
        (call(k[..., :7] if odd else k, v[..., :7] if odd else v), "C: .*got 19 on ranks 0, 1; 7 on rank 2"),
        (call(k.half() if odd else k, v.half() if odd else v), "dtype: .*float32 on ranks 0, 1; .*float16 on rank 2"),
        (call(k, v, return_state=odd), "return_state: .*False on ranks 0, 1; True on rank 2"),
        (error_of(distributed.token_shift, k) if odd else call(k, v), "function: .*token_shift on rank 2"),
    ):
        assert re.match(f"ValueError: {message}", said), said
    # A rank's own error is its own, and the others tell whose it was.
    for said, message in (
        (call(k, v[:, 1:] if odd else v), "ValueError: v: expected shape"),
        (call(k, v, backend="reference" if odd else "auto"), "BackendUnavailable: wkv backend 'reference' cannot run"),
        (call(k, v, state=k if odd else None), "ValueError: state: expected shape"),
    ):
        assert re.match(message if odd else "RuntimeError: rank 2 refused", said), said
    with torch.set_grad_enabled(not odd):
        said = call(k.clone().requires_grad_(), v)
    assert re.match(r"ValueError: torch.is_grad_enabled\(\): .*False on rank 2", said), said
    # Nobody is left in a collective.
    assert call(k, v) == ""


def test_ranks_that_disagree_raise_on_every_rank_and_are_named() -> None:
    on_ranks(3, check_disagreements)


def check_groups() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    tensors = make(Problem(B=4, T=20), torch.float64)
    w, u, k, v, _ = tensors.inputs
    own = [x.chunk(2, 0)[mesh.get_local_rank("data")].chunk(2, 1)[mesh.get_local_rank("context")] for x in (k, v)]
    expected = rwkv_kernels.wkv(w, u, k, v)
    expected = expected.chunk(2, 0)[mesh.get_local_rank("data")].chunk(2, 1)[mesh.get_local_rank("context")]
    for group in (mesh["context"], mesh.get_group("context")):
        torch.testing.assert_close(distributed.wkv(w, u, *own, group=group), expected)
    assert "mesh of one dimension" in error_of(distributed.wkv, w, u, *own, group=mesh)
    other = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        assert "that this process is in" in error_of(distributed.wkv, w, u, *own, group=other)
    placed = DTensor.from_local(own[0], mesh["context"], [Replicate()])
    assert "k: expected a torch.Tensor, this rank's part" in error_of(distributed.wkv, w, u, placed, own[1])


def test_the_group_may_be_a_part_of_the_processes() -> None:
    on_ranks(4, check_groups)


def test_without_a_process_group_the_error_says_what_makes_one() -> None:
    tensors = make(Problem())
    with pytest.raises(RuntimeError, match=r"init_process_group.*torchrun"):
        distributed.wkv(*tensors.inputs)
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.token_shift(tensors.k)


def test_the_package_imports_nothing_of_it() -> None:
    code = "import sys, rwkv_kernels; print([x for x in ('tensor', 'fsdp') if f'torch.distributed.{x}' in sys.modules])"
    assert run_python(code).strip() == "[]"


# ---- what is communicated and kept ----


class Simulation:
    """Ranks that are threads of this process, and all that each of them hands to a collective and saves for backward.

    Stands in for torch.distributed where the package uses it: in an all-gather, and to know who is who.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.sent: list[list[int]] = [[] for _ in range(ranks)]  # bytes of each rank's part of each collective
        self.saved = [0] * ranks  # bytes
        self._parts: list[Tensor] = [torch.empty(0)] * ranks
        self._together = threading.Barrier(ranks, timeout=60)
        self._thread = threading.local()

    @property
    def rank(self) -> int:
        return int(self._thread.rank)

    def all_gather(self, target: Tensor, own: Tensor, group: object, async_op: bool) -> "Simulation":
        assert async_op and target.nbytes == self.ranks * own.nbytes
        self.sent[self.rank].append(own.nbytes)
        self._parts[self.rank] = own
        self._together.wait()
        target.copy_(torch.cat(self._parts))
        self._together.wait()
        return self

    def wait(self) -> None:
        """Of what `all_gather` returns, which is complete."""

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            self._thread.rank = rank
            torch.set_num_threads(1)

            def save(x: Tensor) -> Tensor:
                self.saved[rank] += x.nbytes
                return x

            try:
                with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
                    return function(rank)
            except BaseException:
                self._together.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            return [thread.result() for thread in [pool.submit(on_rank, rank) for rank in range(self.ranks)]]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Simulation]:
    def start(ranks: int) -> Simulation:
        simulation = Simulation(ranks)
        monkeypatch.setattr(module, "_ALL_GATHER", simulation.all_gather)
        monkeypatch.setattr(module.Ranks, "of", lambda _: module.Ranks(None, simulation.rank, ranks))
        monkeypatch.setattr(module.Ranks, "_device", lambda _: torch.device("cpu"))
        return simulation

    return start


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_64_ranks_equal_one_process(ranks: int, simulate: Callable[[int], Simulation]) -> None:
    problem = Problem(T=5 * ranks + 3, C=7, gated=True, with_state=True)
    tensors = make(problem, torch.float64)
    steps = slices(problem.T, ranks)
    given = {name: getattr(tensors, name) for name in ("w", "u", "k", "v", "state", "r")}
    cut = {name: given[name].split(steps, 1) for name in ("k", "v", "r")}
    gy = tensors.gy.split(steps, 1)

    def on_rank(rank: int) -> list[Tensor]:
        own = {name: cut[name][rank] if name in cut else x for name, x in given.items()}
        leaves = {name: x.detach().clone().requires_grad_() for name, x in own.items()}
        y, state = distributed.wkv(**leaves, return_state=True)
        mean, share = state[:, 0] / state[:, 1], (rank + 1) / (ranks * (ranks + 1) / 2)
        ((y * gy[rank]).sum() + share * (mean * tensors.gstate[:, 0]).sum()).backward()
        return [y.detach(), mean.detach(), *(x.grad for x in leaves.values())]

    results = list(zip(*simulate(ranks).run(on_rank), strict=True))
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    y, state = rwkv_kernels.wkv(**leaves, return_state=True)
    mean = state[:, 0] / state[:, 1]
    ((y * tensors.gy).sum() + (mean * tensors.gstate[:, 0]).sum()).backward()
    found = {"y": torch.cat(results[0], 1), "mean": results[1][0]}
    for name, parts in zip(leaves, results[2:], strict=True):
        if name in ("w", "u"):
            found[name] = torch.stack(parts).sum(0)
        else:
            found[name] = parts[0] if name == "state" else torch.cat(parts, 1)
    expected = {"y": y, "mean": mean, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, x in found.items():
        assert (x - expected[name]).norm() < 1e-12 * expected[name].norm(), name


def forward_and_backward(tensors: Tensors, return_state: bool, rank: int) -> None:
    own = [x.clone().requires_grad_() for x in (tensors.w, tensors.u, tensors.k, tensors.v)]
    result = distributed.wkv(*own, return_state=return_state)
    sum(x.sum() for x in (result if return_state else (result,))).backward()


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize(("B", "C"), [(1, 64), (3, 19)])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_volume_and_memory_grow_as_the_document_says(
    ranks: int, B: int, C: int, return_state: bool, simulate: Callable[[int], Simulation]
) -> None:
    """Of a rank with T steps, in float32; the numbers of T cancel where they are compared."""
    for T in (4, 40):
        tensors = make(Problem(B=B, C=C, T=T))
        simulation = simulate(ranks)

        simulation.run(functools.partial(forward_and_backward, tensors, return_state))
        # The agreement, the summaries, and the summaries of adjoints.
        assert simulation.sent == [[64, 4 * 3 * B * C, 4 * (2 + 2 * return_state) * B * C]] * ranks
        # w, u, k, v and a checkpoint, as in one process; two states, but one on the first rank; a row for each rank
        # from this one on.
        in_one_process = 4 * (2 * C + 2 * B * T * C + 3 * B * C)
        assert simulation.saved == [
            in_one_process + 4 * B * C * (3 * (2 - (rank == 0)) + ranks - rank) for rank in range(ranks)
        ]


def test_the_tables_of_the_document_are_right(simulate: Callable[[int], Simulation]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    measured = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+), (\d+) \|$", text, re.MULTILINE)
    assert len(measured) == 3
    for row in measured:
        ranks, *expected = map(int, row)
        tensors = make(Problem(B=1, C=64, T=4))
        found, saved = [], [0, 0]
        for return_state in (False, True):
            simulation = simulate(ranks)
            simulation.run(functools.partial(forward_and_backward, tensors, return_state))
            _, forward, backward = simulation.sent[0]
            found += [backward] if return_state else [forward, backward]
            in_one_process = 4 * (2 * 64 + 2 * 4 * 64 + 3 * 64)
            saved = [simulation.saved[rank] - in_one_process for rank in (0, -1)]
        assert [*found, *saved] == expected
    (model,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def layer" in code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(model, {})
    assert printed.getvalue() in text and len(printed.getvalue()) > 100


def check_collectives() -> None:
    """The simulation counts what a process group is asked for."""
    counted: list[int] = []
    plain = module._ALL_GATHER

    def counting(target: Tensor, own: Tensor, **options: Any) -> Any:
        counted.append(own.nbytes)
        return plain(target, own, **options)

    module._ALL_GATHER = counting
    with torch.profiler.profile() as profile:
        w, u, k, v, _ = make(Problem(T=10)).inputs
        distributed.wkv(w.requires_grad_(), u, k, v).sum().backward()
    assert len([event for event in profile.events() if event.name.startswith("gloo:")]) == len(counted) == 3
    counted.clear()
    previous, _ = distributed.token_shift(k.requires_grad_(), return_last=True)
    previous.sum().backward()
    B, _, C = k.shape
    assert counted == [64, 4 * B * C, 2 * 4 * B * C]


def test_nothing_else_is_communicated() -> None:
    on_ranks(2, check_collectives)
