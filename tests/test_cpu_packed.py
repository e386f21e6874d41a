"""Packed sequences on the CPU: how threads share them, and that each is computed as if it were alone."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from problems import Problem, Tensors, assert_close, checkpoint_interval, make, oracle, solve
from torch import Tensor

import rwkv_kernels

_introspection = pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Tiny ones, in numbers; lengths around a subchunk, an interval and the steps that share partials; none at all.
LENGTHS = (*(1, 0, 2, 1) * 30, 15, 16, 17, 0, 63, 64, 65, 127, 128, 129, 0, 400, 1, 1, 0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _boundaries(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the plan ----


def _draw_lengths(draw: random.Random) -> list[int]:
    kind = draw.choice(["tiny", "heavy tail", "one huge", "equal", "empty"])
    if kind == "equal":
        return [draw.randint(1, 300)] * draw.randint(1, 40)
    lengths = {
        "tiny": lambda: draw.randint(0, 3),
        "heavy tail": lambda: int(20 * draw.paretovariate(1)),
        "one huge": lambda: draw.randint(0, 20),
        "empty": lambda: draw.choice([0, 0, 0, 9]),
    }[kind]
    drawn = [lengths() for _ in range(draw.randint(1, 150))]
    if kind == "one huge":
        drawn[draw.randrange(len(drawn))] = draw.randint(1000, 30000)
    return drawn


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_covers_every_step_and_row_once(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        dtype, lengths = draw.choice(["float32", "bfloat16", "float64"]), _draw_lengths(draw)
        C, threads = draw.choice([1, 64, 100, 768, 2000]), draw.choice([1, 2, 3, 8, 64, 192])
        if sum(lengths) == 0:
            continue
        plan = _introspection.packed_plan_cpu(dtype, _boundaries(lengths), C, threads)
        interval = checkpoint_interval(dtype)
        assert plan["column_channels"] % 64 == 0 and plan["chunk_steps"] % interval == 0
        shares = plan["shares"]
        assert len(shares) == plan["threads"] <= threads
        items = [item for share in shares for item in share]

        starts = range(0, C, plan["column_channels"])
        columns = {c: [item for item in items if item["c_begin"] == c] for c in starts}
        assert sum(map(len, columns.values())) == len(items)
        for c, own in columns.items():
            assert all(item["c_end"] == min(c + plan["column_channels"], C) for item in own)
            at: dict[int, int] = {}
            for item in own:
                assert (
                    item["t_begin"] == at.get(item["n"], 0) and item["t_end"] - item["t_begin"] <= plan["chunk_steps"]
                )
                at[item["n"]] = item["t_end"]
            assert [at[n] for n in range(len(lengths))] == lengths
            cut = [item["row"] for item in own if item["row"] >= 0]
            assert cut == list(range(len(cut)))
            assert all((item["row"] >= 0) == (lengths[item["n"]] > plan["chunk_steps"]) for item in own)
            # Checkpoints: every row is a state's or spare.
            bounds, rows = _boundaries(lengths), []
            for item in own:
                if item["t_end"] == lengths[item["n"]]:
                    first = bounds[item["n"]] // interval + item["n"]
                    rows += range(first, first - (-item["t_end"] // interval))
                    rows += [item["spare_checkpoint"]] * (item["spare_checkpoint"] >= 0)
            assert sorted(rows) == list(range(sum(lengths) // interval + len(lengths)))
            # Partials: rows in order, each opened once, by the last chunk that has them.
            partials = [item["partials"] for item in own]
            assert partials == sorted(partials) and set(partials) == set(range(partials[-1] + 1))
            last = {item["partials"]: i for i, item in enumerate(own)}
            assert [i for i, item in enumerate(own) if item["opens_partials"]] == sorted(last.values())
        owners = [{(item["partials"], item["c_begin"]) for item in share} for share in shares]
        assert max(Counter(key for share in owners for key in share).values()) == 1, "two threads add to one row"
        if plan["chunks"] > 1:
            assert threads > max(sum(lengths) // max(lengths), 1) * -(-C // 64), "split over time without need"


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize(
    "lengths",
    [[1] * 16384, [16384], [1] * 1000 + [15000] + [1] * 1000, [128] * 128, [2**i for i in range(14)]],
    ids=["tiny", "one", "one_huge_among_tiny", "equal", "doubling"],
)
def test_threads_share_the_work(lengths: list[int], threads: int) -> None:
    plan = _introspection.packed_plan_cpu("float32", _boundaries(lengths), 1024, threads)
    assert plan["threads"] == threads
    costs = [
        sum((x["t_end"] - x["t_begin"] + 2) * (x["c_end"] - x["c_begin"]) for x in share) for share in plan["shares"]
    ]
    assert sum(costs) / len(costs) / max(costs) > 0.85


# ---- results ----


def _alone(tensors: Tensors, n: int, begin: int, end: int) -> Tensors:
    """The n-th packed sequence as a batch of one."""

    def steps(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, begin:end]

    def row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[n : n + 1]

    k, v, gy = (x[:, begin:end] for x in (tensors.k, tensors.v, tensors.gy))
    return Tensors(tensors.w, tensors.u, k, v, row(tensors.state), gy, tensors.gstate[n : n + 1], steps(tensors.r))


def _results(x: Tensors) -> dict[str, Tensor]:
    """Of the operators themselves: outputs, and gradients for a given one of the final state."""
    ops = torch.ops.rwkv_kernels
    given = (x.w, x.u, x.k, x.v, x.state, x.r, x.cu_seqlens)
    y, state_out, checkpoints = ops.wkv_mixing_forward(*given, True)
    gradients = ops._wkv_mixing_backward(*given, checkpoints, x.gy, x.gstate)
    names = ("gw", "gu", "gk", "gv", "gstate", "gr")
    return {"y": y, "state_out": state_out, "checkpoints": checkpoints, **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("C", [200, 768])
def test_each_sequence_equals_its_own_call_bit_for_bit(C: int, gated: bool, dtype: torch.dtype, threads: None) -> None:
    tensors = make(Problem(C=C, lengths=LENGTHS, gated=gated, with_state=True), dtype)
    assert tensors.state is not None
    tensors.state[3, 1] = 0  # an empty state, whatever else it holds
    boundaries, interval = _boundaries(LENGTHS), checkpoint_interval(dtype)
    torch.set_num_threads(1)
    own = [_results(_alone(tensors, n, *ends)) for n, ends in enumerate(itertools.pairwise(boundaries))]
    expected = None
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        assert _introspection.packed_plan_cpu(_name(dtype), boundaries, C, count)["chunks"] == 1
        found = _results(tensors)
        for n, (begin, end) in enumerate(itertools.pairwise(boundaries)):
            for name in ("y", "gk", "gv", *["gr"] * gated):
                assert torch.equal(found[name][:, begin:end], own[n][name]), (count, name, n)
            for name in ("state_out", "gstate"):
                assert torch.equal(found[name][n], own[n][name][0]), (count, name, n)
            rows = begin // interval + n
            checkpoints = found["checkpoints"][:, rows : rows + own[n]["checkpoints"].shape[1]]
            assert torch.equal(checkpoints, own[n]["checkpoints"]), (count, n)
        expected = expected or found
        for name, value in found.items():  # gw, gu and the spare checkpoints too
            assert torch.equal(value, expected[name]), (count, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("gated", [False, True])
def test_a_long_one_among_short_ones_is_split_over_time(gated: bool, dtype: torch.dtype, threads: None) -> None:
    problem = Problem(C=50, lengths=(1, 30, 0, 1700, 2), gated=gated, with_state=True)
    torch.set_num_threads(4)
    plan = _introspection.packed_plan_cpu(_name(dtype), _boundaries(problem.lengths or ()), 50, 4)
    assert plan["chunks"] > 2
    tensors = make(problem, dtype)
    assert_close(solve(tensors, "cpu"), oracle(tensors), tensors)
    first, second = _results(tensors), _results(tensors)
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("count", [1, 4])
def test_one_packed_sequence_is_the_batch_of_one(count: int, threads: None) -> None:
    tensors = make(Problem(C=50, lengths=(1700,), gated=True, with_state=True))
    torch.set_num_threads(count)
    packed, alone = _results(tensors), _results(_alone(tensors, 0, 0, 1700))
    checkpoints = alone.pop("checkpoints")
    assert torch.equal(packed.pop("checkpoints")[:, : checkpoints.shape[1]], checkpoints)
    for name, value in packed.items():
        assert torch.equal(value, alone[name]), name


def test_checkpoints_of_no_sequence_are_empty_states() -> None:
    lengths = (3, 64, 0, 1)
    tensors = make(Problem(C=20, lengths=lengths))
    checkpoints = _results(tensors)["checkpoints"][0]
    assert checkpoints.shape[0] == sum(lengths) // 64 + len(lengths)
    owned = {0, 1, 4}  # 0 // 64 + 0, 3 // 64 + 1 and 67 // 64 + 3
    for row in range(checkpoints.shape[0]):
        is_empty = torch.equal(checkpoints[row], rwkv_kernels.empty_state(1, 20)[0])
        assert is_empty == (row not in owned), row


# ---- checks ----

BAD = {
    "not_from_0": ([1, 6], "cu_seqlens: expected to start at 0, got 1"),
    "beyond_the_end": ([0, 7], "cu_seqlens: expected to end at 6, the number of steps of k, got 7"),
    "before_the_end": ([0, 5], "cu_seqlens: expected to end at 6, the number of steps of k, got 5"),
    "falling": ([0, 4, 2, 6], "cu_seqlens: expected to rise, got 2 after 4 at 2"),
    "beyond_between": ([0, 9, 6], "cu_seqlens: expected to rise, got 6 after 9 at 2"),
    "nothing_of_something": ([0], "cu_seqlens: expected to end at 6, the number of steps of k, got 0"),
}


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("name", BAD)
def test_the_operators_refuse_bad_boundaries(name: str, wide: bool) -> None:
    numbers, message = BAD[name]
    boundaries = torch.tensor(numbers, dtype=torch.int64 if wide else torch.int32)
    w, u, k, v, _ = make(Problem(B=1, T=6)).inputs
    ops = torch.ops.rwkv_kernels
    with pytest.raises(RuntimeError, match=message):
        ops.wkv_mixing_forward(w, u, k, v, None, None, boundaries, True)
    checkpoints = torch.zeros(1, 6 // 64 + len(numbers) - 1, 3, 19)
    with pytest.raises(RuntimeError, match=message):
        ops._wkv_mixing_backward(w, u, k, v, None, None, boundaries, checkpoints, k, None)
