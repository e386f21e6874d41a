"""Tests that need a GPU: many blocks at once, streams, graphs, devices, exhausted memory and very large tensors.

The CPU's kernel in float64, which test_operator.py compares with the oracle, takes its place where that is too slow.
"""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import bi_problems
import pytest
import torch
from problems import (
    Problem,
    Tensors,
    assert_close,
    assert_solves,
    assert_tensor_close,
    dtypes_of,
    largest_logit,
    log_denominator,
    make,
    solve,
    tolerance,
)
from test_stress import random_problem
from torch import Tensor

import benchmarks.problem
import rwkv_kernels
from rwkv_kernels.inputs import DTYPES


def _assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor], what: object = "") -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), (what, name)


def _copy(tensors: Tensors, source: Tensors) -> None:
    """Other numbers, where a graph or another stream will read them."""
    for name, x in vars(source).items():
        if x is not None:
            getattr(tensors, name).copy_(x)


# ---- first light: every kernel once, in seconds, before anything else ----

FIRST = Problem(B=2, T=200, C=72, with_state=True)
# Of one tile, of a few, and of more than from one anchor to the next.
FIRST_LENGTHS = (50, 200, 2100)


@pytest.mark.parametrize("T", FIRST_LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_light(dtype: torch.dtype, T: int, gpu_backend: str) -> None:
    assert_solves(make(replace(FIRST, T=T), dtype), gpu_backend, "cpu")


@pytest.mark.parametrize("lengths", [None, (50, 0, 2100, 1, 64, 0, 300)], ids=["gated", "gated_and_packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_light_of_mixing(dtype: torch.dtype, lengths: tuple[int, ...] | None, gpu_backend: str) -> None:
    assert_solves(make(replace(FIRST, gated=True, lengths=lengths), dtype), gpu_backend, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_first_light_of_a_full_device(dtype: torch.dtype, gpu_backend: str) -> None:
    """So many sequences that chunks have several tiles, on a GPU of any size: the same four, again and again."""
    times = torch.cuda.get_device_properties(0).multi_processor_count
    few = make(Problem(B=4, T=600, C=200, with_state=True), dtype)
    many = few.changed(lambda x: x.repeat(times, 1, 1) if x.dim() == 3 else x)
    _, final = rwkv_kernels.wkv(*many.inputs, return_state=True, backend=gpu_backend)
    scale = log_denominator(final.double())
    found = {}
    for name, value in solve(many, gpu_backend, scale).items():
        if name in ("gw", "gu"):
            found[name] = value / times
            continue
        repeated = value.unflatten(0, (times, 4))
        assert (repeated == repeated[:1]).all(), name
        found[name] = repeated[0]
    on_cpu = few.changed(Tensor.cpu)
    exact = solve(on_cpu.exact(), "cpu", scale[:4].cpu())
    assert_close({name: x.cpu() for name, x in found.items()}, exact, on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_first_light_of_keys_that_spread(dtype: torch.dtype, gpu_backend: str) -> None:
    assert_solves(make(replace(FIRST, T=2100, k_scale=20.0), dtype), gpu_backend, "cpu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_light_of_a_step(dtype: torch.dtype, gated: bool, gpu_backend: str) -> None:
    tensors = make(FIRST, dtype)
    exact = tensors.changed(Tensor.cpu).exact()

    def step(given: Tensors, backend: str) -> tuple[Tensor, Tensor]:
        w, u, k, v, state = given.inputs
        assert state is not None
        state, r = state.clone(), given.gy[:, 0] if gated else None
        return rwkv_kernels.wkv_step(w, u, k[:, 0], v[:, 0], state, r=r, backend=backend).cpu(), state.cpu()

    for name, found, expected in zip(("y", "state"), step(tensors, gpu_backend), step(exact, "reference"), strict=True):
        assert_tensor_close(name, found, expected, tolerance(found.dtype, 1, largest_logit(tensors)))


@pytest.mark.parametrize("name", ["gated_and_packed", "two_intervals_and_one", "k_of_20", "growing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_light_of_both_directions(dtype: torch.dtype, name: str, gpu_backend: str) -> None:
    bi_problems.assert_solves(bi_problems.make(bi_problems.PROBLEMS[name], dtype), gpu_backend)


# ---- tiles and chunks ----

EDGES = [
    Problem(B=9, T=2100, C=33, with_state=True),
    *(
        Problem(B=B, T=T, C=C, with_state=with_state)
        for (B, C, with_state), T in itertools.product(
            [(1, 1, True), (2, 33, False), (1, 100, True)], [1, 16, 63, 65, 200, 1024, 1025]
        )
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("problem", EDGES, ids=lambda p: f"{p.B}-{p.T}-{p.C}")
def test_edges_of_tiles_and_chunks(problem: Problem, dtype: torch.dtype, gpu_backend: str) -> None:
    tensors = make(problem, dtype)
    assert_solves(tensors, gpu_backend, "cpu")
    w, u, k, v, _ = tensors.inputs
    state = rwkv_kernels.empty_state(problem.B, problem.C, dtype=w.dtype)
    y = rwkv_kernels.wkv_step(w, u, k[:, 0], v[:, 0], state, backend=gpu_backend)
    torch.testing.assert_close(y, v[:, 0])
    state = rwkv_kernels.empty_state(problem.B, problem.C, dtype=w.dtype)
    gated = rwkv_kernels.wkv_step(w, u, k[:, 0], v[:, 0], state, r=k[:, 0], backend=gpu_backend)
    torch.testing.assert_close(gated, (k[:, 0].double().sigmoid() * v[:, 0]).to(dtype))


# ---- shapes ----


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(60))
def test_a_random_large_problem_equals_the_cpu(seed: int, gpu_backend: str) -> None:
    draw = random.Random(seed)
    dtype = draw.choice(dtypes_of(gpu_backend))
    assert_solves(make(random_problem(draw, 5000, 1000), dtype, seed), gpu_backend, "cpu")


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(30))
def test_random_packed_sequences_equal_the_cpu(seed: int, gpu_backend: str) -> None:
    draw = random.Random(seed)
    lengths = tuple(int(10 ** draw.uniform(-1, 3.5)) for _ in range(draw.randint(1, 40)))
    if not any(lengths):
        lengths = (1,)
    problem = Problem(
        C=draw.randint(1, 600), lengths=lengths, gated=draw.random() < 0.7, with_state=draw.random() < 0.5
    )
    dtype = draw.choice(dtypes_of(gpu_backend))
    tensors = make(problem, dtype, seed)
    assert_solves(tensors, gpu_backend, "cpu")
    first, again = solve(tensors, gpu_backend), solve(tensors, gpu_backend)
    torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)  # the mean of an empty state is NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boundaries_that_are_none_end_and_change_no_later_call(dtype: torch.dtype, gpu_backend: str) -> None:
    """Nothing on the host reads them, so nothing refuses them; the kernels stay inside the tensors."""
    good = make(Problem(C=72, lengths=(300, 0, 64, 701), gated=True, with_state=True), dtype)
    expected = solve(good, gpu_backend)
    total = good.k.shape[1]
    for wrong in ([0, 900, 3, 400, total], [-7, 2**31 - 1, -(2**31), 5, 0], [total] * 5, [5, 1, 1, 1, 2]):
        assert good.cu_seqlens is not None
        solve(replace(good, cu_seqlens=good.cu_seqlens.new_tensor(wrong)), gpu_backend)
    torch.cuda.synchronize()
    _assert_bitwise(solve(good, gpu_backend), expected)


@pytest.mark.parametrize("C", [1, 3, 31, 63, 65, 257, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_widths(C: int, dtype: torch.dtype, gpu_backend: str) -> None:
    assert_solves(make(Problem(B=3, T=129, C=C, with_state=True), dtype), gpu_backend, "cpu")


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_is_not_aligned(offset: int, gpu_backend: str) -> None:
    """Vector loads need more than an element's alignment, and a view does not promise it."""

    def shifted(x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(x.shape)

    tensors = make(Problem(B=2, T=100, C=64, with_state=True), torch.bfloat16)
    assert_solves(tensors.changed(shifted), gpu_backend, "cpu")


def test_many_sequences_and_many_channels(gpu_backend: str) -> None:
    """Beyond 65535, where the second and third dimension of a grid end."""
    assert_solves(make(Problem(B=70000, T=2, C=3)), gpu_backend, "cpu")
    assert_solves(make(Problem(B=1, T=1, C=70000 * 32)), gpu_backend, "cpu")


@pytest.mark.stress
def test_a_million_steps(gpu_backend: str) -> None:
    assert_solves(make(Problem(B=1, T=2**20, C=3, log_decay=-1e-4, with_state=True)), gpu_backend, "cpu")


def _gradients(k: Tensor, v: Tensor, gy: Tensor, state: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    """y, gk and gv of a sum weighted by gy, with parameters that depend on the channel alone."""
    C = k.shape[-1]
    leaves = [x.detach().requires_grad_() for x in (k, v)]
    y = rwkv_kernels.wkv(torch.linspace(-6, 1, C), torch.linspace(-1, 1, C), *leaves, state, backend=backend)
    return (y.detach(), *torch.autograd.grad(y, leaves, gy))


@pytest.mark.stress
@pytest.mark.parametrize(("B", "T", "C"), [(9, 2**16, 3648), (1, 2**20, 2052)], ids=["many_sequences", "one_sequence"])
def test_more_than_2_to_the_31_elements(B: int, T: int, C: int, gpu_backend: str) -> None:
    """The end of the whole equals the end alone, cut off along the batch or along time, which has fewer."""
    assert B * T * C > 2**31
    needed = 12 * B * T * C * torch.bfloat16.itemsize
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, and {free / 2**30:.0f} are")
    k, v, gy = (torch.randn(B, T, C, dtype=torch.bfloat16) for _ in range(3))
    whole = _gradients(k, v, gy, None, gpu_backend)
    if B > 1:
        end = (slice(B - 1, B), slice(None))
        state = None
    else:
        end = (slice(None), slice(T // 2, T))
        w, u = torch.linspace(-6, 1, C), torch.linspace(-1, 1, C)
        start = (k[:, : T // 2], v[:, : T // 2])
        y, state = rwkv_kernels.wkv(w, u, *start, return_state=True, backend=gpu_backend)
        torch.testing.assert_close(whole[0][:, : T // 2], y, rtol=2**-7, atol=1e-3)
    for found, alone in zip(whole, _gradients(k[end], v[end], gy[end], state, gpu_backend), strict=True):
        # bfloat16 rounds to 2^-9, and the two ways may round a number between two to either.
        torch.testing.assert_close(found[end], alone, rtol=2**-7, atol=1e-3)


LARGER_THAN_THE_DEVICE = [(1, 65536, 2560), (3, 20000, 640)]


@pytest.mark.stress
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGER_THAN_THE_DEVICE, ids=lambda shape: "-".join(map(str, shape)))
def test_more_blocks_than_the_device_holds(shape: tuple[int, int, int], dtype: torch.dtype, gpu_backend: str) -> None:
    """Right, and the same bits in ten runs alone and ten beside matrix products that occupy the multiprocessors."""
    large = benchmarks.problem.Problem(shape, dtype)

    def function(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rwkv_kernels.wkv(w, u, k, v, backend=gpu_backend)

    large.check(function)
    expected = large.forward_and_backward(function)
    hog, matrix = torch.cuda.Stream(), torch.randn(8192, 8192, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for run in range(20):
        if run >= 10:
            with torch.cuda.stream(hog):
                for _ in range(10):
                    torch.mm(matrix, matrix)
        for i, x in enumerate(large.forward_and_backward(function)):
            assert torch.equal(x, expected[i]), (run, i)
    torch.cuda.synchronize()


# ---- streams ----


def _various_tensors() -> list[Tensors]:
    shapes = [(1, 4000, 64), (4, 300, 100), (1, 1, 768), (2, 65, 33), (600, 700, 128), (1, 9000, 32)]
    dtypes = [torch.bfloat16, torch.float32]
    problems = [Problem(B=B, T=T, C=C, with_state=True) for B, T, C in shapes]
    return [make(problem, dtypes[i % 2], seed=i) for i, problem in enumerate(problems)]


def test_concurrent_streams_give_bitwise_what_one_gives(gpu_backend: str) -> None:
    tensors = _various_tensors()
    expected = [solve(x, gpu_backend) for x in tensors]
    streams = [torch.cuda.Stream() for _ in tensors]
    torch.cuda.synchronize()
    for run in range(20):
        found = []
        for x, stream in zip(tensors, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(solve(x, gpu_backend))
        torch.cuda.synchronize()
        for i, results in enumerate(found):
            _assert_bitwise(results, expected[i], (run, i))


def test_concurrent_threads_give_bitwise_what_one_gives(gpu_backend: str) -> None:
    tensors = _various_tensors()
    expected = [solve(x, gpu_backend) for x in tensors]
    torch.cuda.synchronize()
    errors: list[Exception] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for run in range(20):
                    _assert_bitwise(solve(tensors[i], gpu_backend), expected[i], (run, i))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tensors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_work_is_ordered_by_the_current_stream(gpu_backend: str) -> None:
    """A kernel on another stream would read the inputs before the long wait is over."""
    ready = make(Problem(B=2, T=300, C=64, with_state=True))
    expected = solve(ready, gpu_backend)
    late = ready.changed(torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        _copy(late, ready)
        found = solve(late, gpu_backend)
    torch.cuda.synchronize()
    _assert_bitwise(found, expected)


# ---- graphs ----


def _capture(call: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize(("B", "T", "C"), [(2, 300, 64), (1, 5000, 48), (16, 40, 200), (600, 300, 64)])
def test_a_graph_replays_forward_and_backward_with_new_inputs(B: int, T: int, C: int, gpu_backend: str) -> None:
    problem = Problem(B=B, T=T, C=C, with_state=True)
    inputs = make(problem, torch.bfloat16)
    graph, replayed = _capture(lambda: solve(inputs, gpu_backend))
    for seed in range(1, 6):
        changed = make(problem, torch.bfloat16, seed)
        _copy(inputs, changed)
        graph.replay()
        _assert_bitwise(replayed, solve(changed, gpu_backend), seed)
        graph.replay()  # a replay must leave nothing behind that changes the next
        _assert_bitwise(replayed, solve(changed, gpu_backend), seed)


@pytest.mark.parametrize("gated", [False, True])
def test_a_graph_of_packed_sequences_replays_with_other_boundaries(gated: bool, gpu_backend: str) -> None:
    """Shapes alone decide the launches: of as many sequences and steps, any lengths."""
    first, *others = [(300, 0, 64, 1, 700), (0, 1065, 0, 0, 0), (213,) * 5, (1, 1, 1, 1, 1061), (1000, 1, 63, 1, 0)]
    problem = Problem(C=72, lengths=first, gated=gated, with_state=True)
    inputs = make(problem, torch.bfloat16)
    graph, replayed = _capture(lambda: solve(inputs, gpu_backend))
    for seed, lengths in enumerate(others):
        changed = make(replace(problem, lengths=lengths), torch.bfloat16, seed)
        _copy(inputs, changed)
        for _ in range(2):  # a replay must leave nothing behind that changes the next
            graph.replay()
            _assert_bitwise(replayed, solve(changed, gpu_backend), lengths)


def test_a_graph_of_one_step_decodes_a_sequence(gpu_backend: str) -> None:
    tensors = make(Problem(B=3, T=50, C=100, with_state=True), torch.bfloat16)
    w, u, k, v, initial = tensors.inputs
    assert initial is not None
    eager = initial.clone()
    r = tensors.gy
    expected = [rwkv_kernels.wkv_step(w, u, k[:, t], v[:, t], eager, r=r[:, t], backend=gpu_backend) for t in range(50)]

    kt, vt, rt, state = *(torch.empty_like(x[:, 0]) for x in (k, v, r)), initial.clone()
    graph, replayed = _capture(lambda: {"y": rwkv_kernels.wkv_step(w, u, kt, vt, state, r=rt, backend=gpu_backend)})
    state.copy_(initial)  # the warm-up has advanced it
    for t in range(50):
        kt.copy_(k[:, t])
        vt.copy_(v[:, t])
        rt.copy_(r[:, t])
        graph.replay()
        assert torch.equal(replayed["y"], expected[t]), t
    assert torch.equal(state, eager)


# ---- devices and memory ----


def test_another_device_than_the_current_one(gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = make(Problem(with_state=True)).changed(lambda x: x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_solves(tensors, gpu_backend, "cpu")
    assert solve(tensors, gpu_backend)["y"].device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.fixture
def no_more_memory(gpu_backend: str) -> Iterator[Callable[[], None]]:
    """A function after whose call the GPU's allocator has nothing more to give than a few megabytes."""
    torch.cuda.empty_cache()  # otherwise the test's tensors would lie in larger blocks with free room

    def exhaust() -> None:
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + 2**24
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)

    yield exhaust
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.stress
def test_a_step_without_memory_raises_and_leaves_the_state(
    no_more_memory: Callable[[], None], gpu_backend: str
) -> None:
    B, C = 2**10, 2**16
    w, u, k = torch.zeros(C), torch.zeros(C), torch.ones(B, C)
    state = rwkv_kernels.empty_state(B, C)
    before = state.clone()
    no_more_memory()
    with pytest.raises(torch.OutOfMemoryError):
        rwkv_kernels.wkv_step(w, u, k, k, state, backend=gpu_backend)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(state, before)
    assert torch.equal(rwkv_kernels.wkv_step(w, u, k, k, state, backend=gpu_backend), k)


@pytest.mark.stress
def test_forward_and_backward_without_memory_raise_and_work_later(
    no_more_memory: Callable[[], None], gpu_backend: str
) -> None:
    tensors = make(Problem(B=1, T=2048, C=4096))
    expected = solve(tensors, gpu_backend)
    leaves = [x.detach().requires_grad_() for x in tensors.inputs if x is not None]
    torch.cuda.empty_cache()
    y = rwkv_kernels.wkv(*leaves, backend=gpu_backend)
    no_more_memory()
    with pytest.raises(torch.OutOfMemoryError):
        rwkv_kernels.wkv(*leaves, backend=gpu_backend)
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(y, leaves, tensors.gy)
    torch.cuda.set_per_process_memory_fraction(1.0)
    _assert_bitwise(solve(tensors, gpu_backend), expected)
