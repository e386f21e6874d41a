"""The plans of the GPU kernels: pure functions of a problem and a device's limits, so they are tested anywhere."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from problems import checkpoint_interval

_introspection = pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")

Limits = dict[str, int]
H100 = {"multiprocessors": 132, "shared_per_block": 232448, "shared_per_multiprocessor": 233472, "architecture": 900}
T4 = {"multiprocessors": 40, "shared_per_block": 65536, "shared_per_multiprocessor": 65536, "architecture": 750}
# The shared memory of every GPU of 8.6, 8.9 and 12.0.
A10 = {"multiprocessors": 72, "shared_per_block": 101376, "shared_per_multiprocessor": 102400, "architecture": 860}
DTYPES = ("float32", "float16", "bfloat16", "float64")
OPERATIONS = ("forward", "backward", "mixing_forward", "mixing_backward")

# Bytes of shared memory that a GPU reserves for each block; Turing reserves none.
RESERVED = 1024
MOST_BLOCKS_OF_A_GRID = 65535
MESSAGE_BYTES, TICKET_BYTES = 3 * 64 * 4, 4

# The kernels' tuning constants.
_HEADER = (Path(__file__).parent.parent / "csrc" / "gpu" / "tuning.h").read_text()
CHOSEN = {name: int(value) for name, value in re.findall(r"constexpr int(?:64_t)? k(\w+) = (\d+);", _HEADER)}
WARP_THREADS, ANCHOR = CHOSEN["WarpThreads"], CHOSEN["Anchor"]
STEPS = {name: CHOSEN["ForwardSteps" if "forward" in name else "BackwardSteps"] for name in OPERATIONS}  # of a thread


def _forward_warps(dtype: str, limits: Limits) -> int:
    """The most: eight where registers suffice, and shared memory for two blocks of them."""
    return 8 if _size(dtype) == 2 and limits["architecture"] in (800, 900) else 4


def _least_warps(dtype: str) -> int:
    """The fewest of forward: the place of k must hold the messages and the warps' sums."""
    return 2 if _size(dtype) == 2 else 1


def _plan(operation: str, dtype: str, B: int, T: int, C: int, limits: Limits | None = None) -> dict[str, Any]:
    return _introspection.plan_cuda(operation, dtype, B, T, C, limits)  # type: ignore[no-any-return]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _size(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_covers_every_element_once_and_fits_the_device(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        operation, dtype = draw.choice(OPERATIONS), draw.choice(DTYPES)
        B, T, C = (int(10 ** draw.uniform(0, limit)) for limit in (3, 8, 5))
        limits = {**draw.choice([H100, T4, A10]), "multiprocessors": draw.randint(1, 200)}
        plan = _plan(operation, dtype, B, T, C, limits)
        case = (operation, dtype, B, T, C, limits, plan)
        channels = 32 if dtype == "float64" else 64
        assert (plan["channel_tiles"] - 1) * channels < C <= plan["channel_tiles"] * channels, case
        assert plan["channel_tiles"] < 2**31 and 1 <= plan["chunks"] <= MOST_BLOCKS_OF_A_GRID, case
        assert plan["shared_bytes"] <= limits["shared_per_block"], case
        if dtype == "float64":
            assert plan["chunks"] == 1 and plan["threads"] == 32, case
            continue
        chunk_steps = plan["chunk_tiles"] * plan["tile_steps"]
        assert (plan["chunks"] - 1) * chunk_steps < T <= plan["chunks"] * chunk_steps, case
        assert plan["tile_steps"] == plan["warps"] * STEPS[operation], case
        assert plan["threads"] == plan["warps"] * WARP_THREADS <= 256, case
        if "forward" in operation:
            assert plan["warps"] in (1, 2, 4, 8), case
            assert _least_warps(dtype) <= plan["warps"] <= _forward_warps(dtype, limits), case
            assert plan["warps"] == _least_warps(dtype) or plan["tile_steps"] // 2 < T, (
                "half as many would hold the sequence"
            )
        else:
            assert plan["tile_steps"] == checkpoint_interval(dtype), "a tile lies between two checkpoints"

        columns, tiles = B * plan["channel_tiles"], _ceil_div(T, plan["tile_steps"])
        if columns >= CHOSEN["ColumnsPerMultiprocessor"] * limits["multiprocessors"]:
            assert plan["anchor"] == 1, "chunks that are to start have predecessors that have ended"
        elif plan["chunk_tiles"] > 1:
            assert tiles > MOST_BLOCKS_OF_A_GRID and plan["anchor"] == 1, case
        else:
            assert plan["anchor"] == ANCHOR, case
        if plan["chunk_tiles"] > 1 and tiles <= MOST_BLOCKS_OF_A_GRID:
            assert columns * plan["chunks"] >= CHOSEN["BlocksPerMultiprocessor"] * limits["multiprocessors"], (
                "the end of the launch is to be evened out"
            )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_that_of_partials_messages_and_tickets(dtype: str, operation: str) -> None:
    for B, T, C in [(1, 1, 1), (3, 1000, 100), (200, 1000, 100), (1, 10**7, 64)]:
        plan = _plan(operation, dtype, B, T, C)
        columns, chunks = B * plan["channel_tiles"], plan["chunks"]
        partials = B * chunks * 2 * C * (8 if dtype == "float64" else 4) if "backward" in operation else 0
        exchange = columns * ((chunks - 1) * MESSAGE_BYTES + TICKET_BYTES) if chunks > 1 else 0
        assert plan["workspace_bytes"] == partials + exchange


@pytest.mark.parametrize("seed", range(10))
def test_the_plan_of_packed_sequences_has_a_row_for_every_chunk_of_any_lengths(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        operation, dtype = draw.choice(OPERATIONS[2:]), draw.choice(DTYPES)
        lengths = [int(10 ** draw.uniform(-1, 4)) for _ in range(draw.randint(1, 50))]
        N, total, C = len(lengths), max(sum(lengths), 1), draw.randint(1, 3000)
        limits = draw.choice([H100, T4, A10])
        plan = _introspection.packed_plan_cuda(operation, dtype, N, total, C, limits)
        case = (operation, dtype, lengths, C, limits, plan)
        rows = N if dtype == "float64" else plan["chunks"]
        partials = rows * 2 * C * (8 if dtype == "float64" else 4) if "backward" in operation else 0
        messages = plan["channel_tiles"] * ((plan["chunks"] - 1) * MESSAGE_BYTES + TICKET_BYTES)
        assert plan["workspace_bytes"] == partials + (messages if plan["chunks"] > 1 else 0), case
        assert plan["shared_bytes"] <= limits["shared_per_block"], case
        if dtype == "float64":
            assert plan["chunks"] == 1, case
            continue
        assert (plan["chunk_tiles"], plan["anchor"]) == (1, ANCHOR), case
        begin, taken = 0, set()
        for n, length in enumerate(lengths):
            first = begin // plan["tile_steps"] + n
            own = range(first, first + max(_ceil_div(length, plan["tile_steps"]), 1))
            assert taken.isdisjoint(own) and own[-1] < plan["chunks"], case
            taken.update(own)
            begin += length


def test_chunks_are_of_several_tiles_where_columns_fill_the_device() -> None:
    few = _plan("forward", "bfloat16", 1, 4096, 768)
    assert (few["chunk_tiles"], few["chunks"], few["anchor"]) == (1, 16, 8)
    many = _plan("backward", "bfloat16", 64, 4096, 4096)
    assert (many["chunk_tiles"], many["chunks"], many["anchor"]) == (32, 2, 1)
    most = _plan("backward", "bfloat16", 256, 4096, 4096)
    assert (most["chunk_tiles"], most["chunks"], most["anchor"]) == (64, 1, 1)
    long = _plan("forward", "bfloat16", 1, 65535 * 256, 64)
    assert (long["chunk_tiles"], long["chunks"], long["anchor"]) == (1, 65535, 8)
    longer = _plan("forward", "bfloat16", 1, 65535 * 256 + 1, 64)
    assert (longer["chunk_tiles"], longer["chunks"], longer["anchor"]) == (2, 32768, 1)


def test_a_short_sequence_has_no_more_warps_than_subchunks_but_for_the_least() -> None:
    assert [_plan("forward", "bfloat16", 1, T, 64)["warps"] for T in (1, 64, 65, 129, 1000)] == [2, 2, 4, 8, 8]
    assert [_plan("forward", "float32", 1, T, 64)["warps"] for T in (1, 32, 33, 65, 1000)] == [1, 1, 2, 4, 4]


# ---- shared memory ----


def _blocks_that_fit(operation: str, dtype: str, limits: Limits, reserved: int) -> int:
    shared: int = _plan(operation, dtype, 8, 1024, 768, limits)["shared_bytes"]
    assert shared <= limits["shared_per_block"]
    return limits["shared_per_multiprocessor"] // (shared + reserved)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_multiprocessor_has_room_for_several_blocks(dtype: str) -> None:
    of_16_bits = _size(dtype) == 2
    for limits, reserved in ((H100, RESERVED), (A10, RESERVED), (T4, RESERVED)):
        assert _blocks_that_fit("forward", dtype, limits, reserved) >= 2
    assert _plan("forward", dtype, 8, 1024, 768, H100)["warps"] == _forward_warps(dtype, H100)
    assert _blocks_that_fit("backward", dtype, H100, RESERVED) >= 3
    assert _blocks_that_fit("backward", dtype, A10, RESERVED) >= (3 if of_16_bits else 2)
    assert _blocks_that_fit("backward", dtype, T4, 0) >= (2 if of_16_bits else 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gate_leaves_room_for_two_blocks_but_backward_on_the_smallest_multiprocessors(dtype: str) -> None:
    for limits in (H100, A10, T4):
        assert _blocks_that_fit("mixing_forward", dtype, limits, RESERVED) >= 2
    assert _plan("mixing_forward", dtype, 8, 1024, 768, H100)["warps"] == _forward_warps(dtype, H100)
    assert _blocks_that_fit("mixing_backward", dtype, H100, RESERVED) >= 3
    assert _blocks_that_fit("mixing_backward", dtype, A10, RESERVED) >= 2
    assert _blocks_that_fit("mixing_backward", dtype, T4, 0) >= 1


def test_forward_takes_fewer_warps_where_two_blocks_of_more_have_no_room() -> None:
    warps = {}
    for shared in range(10_000, 160_000, 500):
        limits = {**H100, "shared_per_multiprocessor": shared}
        for dtype in ("float32", "bfloat16"):
            plan = _plan("forward", dtype, 8, 1024, 768, limits)
            room = 2 * (plan["shared_bytes"] + RESERVED) <= shared
            assert room or plan["warps"] == _least_warps(dtype)
            of_its_warps = 2 * plan["tile_steps"] * 64 * _size(dtype)
            more = 2 * (plan["shared_bytes"] + of_its_warps + RESERVED) <= shared
            assert plan["warps"] == _forward_warps(dtype, limits) or not more, "twice as many warps have room"
            warps[shared, dtype] = plan["warps"]
    assert set(warps.values()) == {1, 2, 4, 8}


# ---- memory ----

# Bytes of global memory for each element of k: for look-back, and with the checkpoints that backward replays from.
MOST_WORKSPACE, MOST_ALTOGETHER = 0.3125, 0.5


@pytest.mark.parametrize("limits", [H100, T4], ids=["H100", "T4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages_of_chunks_are_small(dtype: str, limits: Limits) -> None:
    for B, T, C in [(8, 1024, 768), (1, 4096, 768), (1, 65536, 2560), (32, 1024, 2048)]:
        of_state = 8 if dtype == "float64" else 4
        checkpoints = 3 * of_state / checkpoint_interval(dtype)
        for operation in OPERATIONS:
            workspace = _plan(operation, dtype, B, T, C, limits)["workspace_bytes"] / (B * T * C)
            print(f"{operation} {dtype} {B, T, C}: {workspace:.3f} and {workspace + checkpoints:.3f} bytes an element")
            # Tiles of a single warp, the most that two blocks have room for there, publish three times as much.
            more = 0.1 if (limits, dtype) == (T4, "float32") else 0.0
            assert workspace <= MOST_WORKSPACE + more and workspace + checkpoints <= MOST_ALTOGETHER + more


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operation", "like"), [("summary", "forward"), ("adjoint_summary", "mixing_backward")])
def test_a_summary_is_cut_as_the_kernel_whose_scan_it_is(operation: str, like: str, dtype: str) -> None:
    for B, T, C in [(1, 1, 1), (3, 1000, 100), (200, 1000, 100), (1, 10**7, 64)]:
        for limits in (H100, T4, A10):
            plan, expected = _plan(operation, dtype, B, T, C, limits), _plan(like, dtype, B, T, C, limits)
            partials = B * expected["chunks"] * 2 * C * (8 if dtype == "float64" else 4) if "backward" in like else 0
            expected["workspace_bytes"] -= partials
            if dtype == "float64":
                expected["shared_bytes"] = 0
            assert plan == expected


# ---- refused problems ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("forward", "int8", 1, 1, 1), "dtype: expected float32, float16, bfloat16 or float64, got int8"),
        (
            ("sideways", "float32", 1, 1, 1),
            "operation: expected forward, backward, mixing_forward, mixing_backward, summary or adjoint_summary, got "
            "sideways",
        ),
        (("forward", "float32", 0, 1, 1), "plan: expected B, T and C of at least 1"),
        (("backward", "float32", 1, 0, 1), "plan: expected B, T and C of at least 1"),
        (("forward", "float64", 1, 1, -1), "plan: expected B, T and C of at least 1"),
        (("forward", "bfloat16", 1, 1, 64 * 2**31), "C has 2147483648 tiles of channels, a grid has 2147483647 blocks"),
        (("backward", "float64", 1, 1, 32 * 2**31), "C has 2147483648 tiles of channels, a grid has 2147483647 blocks"),
        (
            ("backward", "float32", 1, 1, 1, {**T4, "shared_per_block": 1024}),
            "a block needs 49936 bytes of shared memory, the device has 1024",
        ),
        (("forward", "float32", 1, 1, 1, {**T4, "shared_per_block": 1024}), "a block needs .* the device has 1024"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _introspection.plan_cuda(*arguments)


def test_packed_sequences_that_cannot_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="plan: expected N, total and C of at least 1"):
        _introspection.packed_plan_cuda("mixing_forward", "float32", 0, 1, 1)
    with pytest.raises(ValueError, match="packed sequences have .* chunks, 44000000 at most can be counted"):
        _introspection.packed_plan_cuda("mixing_backward", "float32", 45_000_000, 45_000_000, 1)


def test_the_largest_grid_is_not_refused() -> None:
    assert _plan("forward", "bfloat16", 1, 1, 64 * (2**31 - 1))["channel_tiles"] == 2**31 - 1
