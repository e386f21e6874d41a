"""The plans of the GPU kernels: pure functions of a problem and a device's limits, so they are tested anywhere."""

import random
from typing import Any

import pytest
from problems import checkpoint_interval

_introspection = pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")

H100 = {
    "multiprocessors": 132,
    "shared_per_block": 232448,
    "shared_per_multiprocessor": 233472,
}
T4 = {
    "multiprocessors": 40,
    "shared_per_block": 65536,
    "shared_per_multiprocessor": 65536,
}
DTYPES = ("float32", "float16", "bfloat16", "float64")


def _random_request(draw: random.Random, operation: str, dtype: str, limits: dict[str, int]) -> dict[str, Any]:
    schedules = [None, "serial", "chunked"] if dtype == "float64" else [None, "serial", "chunked", "single_pass"]
    request: dict[str, Any] = {"schedule": draw.choice(schedules)}
    most = 8 if dtype != "float64" else 16
    steps = 64 if dtype != "float64" else 128
    if operation == "forward" and draw.random() < 0.5:
        # What eight spans of float32 stage needs more shared memory than some devices have.
        request["spans"] = draw.randint(1, most if limits["shared_per_block"] > 100_000 else most // 4)
        steps = 32 * request["spans"]
        if request["schedule"] in (None, "chunked") and draw.random() < 0.5:
            request["chunk_len"] = steps * draw.randint(1, 20)
    if operation == "backward" and request["schedule"] in (None, "chunked") and draw.random() < 0.5:
        request["chunk_len"] = steps * draw.randint(1, 20)
    return request


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_covers_every_element_once_and_fits_the_device(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        operation, dtype = draw.choice(["forward", "backward"]), draw.choice(DTYPES)
        B, T, C = (int(10 ** draw.uniform(0, limit)) for limit in (3, 6, 4))
        limits = {**draw.choice([H100, T4]), "multiprocessors": draw.randint(1, 200)}
        request = _random_request(draw, operation, dtype, limits)
        plan = _introspection.plan_cuda(operation, dtype, B, T, C, limits, **request)
        lanes, channels = (16, 16) if dtype == "float64" else (32, 64)
        assert (plan["channel_tiles"] - 1) * channels < C <= plan["channel_tiles"] * channels
        assert (plan["chunks"] - 1) * plan["chunk_len"] < T <= plan["chunks"] * plan["chunk_len"]
        assert plan["chunk_len"] % plan["tile_steps"] == 0
        assert plan["tile_steps"] == plan["spans"] * (32 if operation == "forward" else 16)
        assert plan["threads"] == plan["spans"] * lanes <= 256
        assert plan["shared_bytes"] <= limits["shared_per_block"]
        assert plan["channel_tiles"] < 2**31 and plan["batch_per_launch"] <= 65535
        assert plan["chunks"] <= 65535
        assert (plan["schedule"] == "serial") == (plan["chunks"] == 1)
        assert request["schedule"] in (None, plan["schedule"]) or plan["chunks"] == 1
        wants_ring = plan["spans"] == 1 and plan["schedule"] != "single_pass" and min(T, plan["chunk_len"]) > 32
        if operation == "forward" and wants_ring and request["schedule"] != "single_pass" and dtype != "float64":
            of_a_ring = plan["shared_bytes"] if plan["buffers"] == 2 else 2 * plan["shared_bytes"]
            assert plan["buffers"] == 2 or 4 * of_a_ring > limits["shared_per_multiprocessor"]
            assert plan["buffers"] == 1 or 4 * of_a_ring <= limits["shared_per_multiprocessor"]
        else:
            assert plan["buffers"] == 1
        if plan["schedule"] == "single_pass":
            assert plan["chunk_len"] == plan["tile_steps"] and 1 <= plan["group"] <= 32
            assert plan["signal_count"] == (1 + plan["chunks"]) * B * plan["channel_tiles"] < 2**32
        if operation == "backward":
            assert plan["tile_steps"] == checkpoint_interval(dtype), "a tile starts from a checkpoint"
        if request.get("spans"):
            assert plan["spans"] == request["spans"]
        if request["schedule"] == "serial" and T <= 65535:
            assert plan["chunks"] == 1
        if request.get("chunk_len") and T <= 65535:
            assert plan["chunk_len"] == min(request["chunk_len"], -(-T // plan["tile_steps"]) * plan["tile_steps"])


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_few_channels_are_split_over_time_and_many_are_not(operation: str) -> None:
    few = _introspection.plan_cuda(operation, "bfloat16", 1, 4096, 768)
    assert few["schedule"] == "single_pass" and few["reason"] == "the channels alone leave multiprocessors idle"
    assert few["chunks"] * few["channel_tiles"] >= 132
    many = _introspection.plan_cuda(operation, "bfloat16", 64, 1024, 4096)
    assert many["schedule"] == "serial" and many["reason"] == "the channels alone keep the device busy"
    double = _introspection.plan_cuda(operation, "float64", 1, 4096, 768)
    assert double["schedule"] == "chunked" and "single pass needs a warp" in double["reason"]
    tile = 128 if operation == "forward" else 64
    long = _introspection.plan_cuda(operation, "bfloat16", 1, 65535 * tile, 64)
    assert long["schedule"] == "single_pass" and long["chunks"] == 65535
    longer = _introspection.plan_cuda(operation, "bfloat16", 1, 65535 * tile + 1, 64)
    assert longer["schedule"] == "chunked" and "more blocks than a grid" in longer["reason"]
    short = _introspection.plan_cuda(operation, "bfloat16", 1, 5, 768)
    assert short["schedule"] == "serial" and short["reason"] == "one tile holds the whole sequence"


def test_a_span_alone_has_a_ring_where_a_multiprocessor_has_room_for_four() -> None:
    def buffers_and_spans(dtype: str, B: int, limits: dict[str, int]) -> tuple[int, int]:
        plan = _introspection.plan_cuda("forward", dtype, B, 1024, 2048, limits)
        assert plan["schedule"] == "serial"
        return plan["buffers"], plan["spans"]

    for dtype in ("float32", "float16", "bfloat16"):
        assert buffers_and_spans(dtype, 17, H100) == (2, 1)
        assert buffers_and_spans(dtype, 20, T4) == (1, 1)
        assert buffers_and_spans(dtype, 10, T4)[0] == 1
    assert buffers_and_spans("float64", 10, H100) == (1, 4)
    assert _introspection.plan_cuda("forward", "float32", 64, 32, 4096, H100)["buffers"] == 1, "there is one tile"
    assert _introspection.plan_cuda("forward", "float32", 1, 999, 64, H100, spans=1, chunk_len=32)["buffers"] == 1, (
        "of each chunk"
    )


@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_chunks_hand_on_is_small(operation: str, dtype: str) -> None:
    for B, T, C in [(8, 1024, 768), (1, 4096, 768), (1, 65536, 2560), (32, 1024, 2048)]:
        plan = _introspection.plan_cuda(operation, dtype, B, T, C)
        interval = checkpoint_interval(dtype)
        checkpoints = 3 * (8 if dtype == "float64" else 4) / interval
        assert plan["workspace_bytes"] / (B * T * C) + checkpoints <= 0.5


@pytest.mark.parametrize(
    ("arguments", "request_", "message"),
    [
        (("forward", "int8", 1, 1, 1), {}, "dtype: expected float32.*got int8"),
        (("sideways", "float32", 1, 1, 1), {}, "operation: expected forward or backward, got sideways"),
        (("forward", "float32", 0, 1, 1), {}, "B, T and C of at least 1"),
        (
            ("forward", "float32", 1, 1, 1),
            {"schedule": "random"},
            "schedule: expected serial, .*single_pass, got random",
        ),
        (("forward", "float64", 1, 99, 1), {"schedule": "single_pass"}, "schedule: a single pass needs a warp"),
        (("backward", "float32", 10**6, 10**6, 1), {"schedule": "single_pass"}, "more blocks than a grid"),
        (("forward", "float32", 1, 1, 1), {"spans": 9}, "spans: expected 1 to 8, got 9"),
        (("backward", "float32", 1, 1, 1), {"spans": 5}, "spans: backward has 4 spans"),
        (("forward", "float32", 1, 99, 1), {"spans": 2, "chunk_len": 48}, "chunk_len: expected a multiple of 64"),
        (("forward", "float32", 1, 10**7, 1), {"spans": 1, "chunk_len": 32}, "chunk_len: more chunks than a grid"),
        (
            ("forward", "float32", 1, 99, 1),
            {"schedule": "serial", "chunk_len": 64},
            "chunk_len: a serial schedule has no choice",
        ),
        (("forward", "float32", 1, 99, 1), {"spans": 2, "buffers": 2}, "buffers: two are a ring, which forward has"),
        (("backward", "float32", 1, 99, 1), {"buffers": 2}, "buffers: two are a ring, which forward has"),
        (("forward", "float32", 1, 99, 1), {"buffers": 3}, "buffers: expected 1 or 2, got 3"),
        (("forward", "float32", 1, 999, 1), {"group": 33}, "group: expected 1 to 32, got 33"),
        (("forward", "float32", 1, 999, 1), {"schedule": "serial", "group": 2}, "group: it is of a single_pass"),
        (
            ("backward", "float32", 1, 1, 1),
            {"limits": {**T4, "shared_per_block": 1024}},
            "needs .* bytes of shared memory, the device has 1024",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments: tuple[Any, ...], request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _introspection.plan_cuda(*arguments, **request_)


def test_what_is_asked_of_a_plan_is_met_and_named() -> None:
    plan = _introspection.plan_cuda("forward", "float32", 1, 999, 1, schedule="single_pass", group=5, spans=None)
    assert (plan["schedule"], plan["group"]) == ("single_pass", 5)
    plan = _introspection.plan_cuda("forward", "float32", 1, 999, 1, schedule="serial", spans=1, buffers=1)
    assert (plan["spans"], plan["buffers"]) == (1, 1)
    with pytest.raises(TypeError, match="a plan has no choice of wraps"):
        _introspection.plan_cuda("forward", "float32", 1, 999, 1, wraps=1)


def _launches(operation: str, B: int, T: int, C: int, **request: Any) -> list[dict[str, Any]]:
    names = ["k", "v", "gy"]
    arguments: dict[str, Any] = {"w": 0, "u": 0, "w_dtype": "float32", "u_dtype": "float32"}
    arguments |= {f"{name}_{stride}_stride": 0 for name in names for stride in ("batch", "time")}
    return _introspection.cuda_launches(operation, "bfloat16", B, T, C, arguments, **request)  # type: ignore[no-any-return]


def test_each_schedule_has_its_launches() -> None:
    def kernels(operation: str, schedule: str) -> list[str]:
        return [launch["kernel"] for launch in _launches(operation, 2, 1000, 100, schedule=schedule)]

    assert kernels("forward", "serial") == ["forward"]
    assert kernels("forward", "chunked") == ["summarise_states", "carry_states", "forward"]
    assert kernels("backward", "serial") == ["backward", "reduce"]
    assert kernels("forward", "single_pass") == ["clear", "forward_single_pass"]
    assert kernels("backward", "single_pass") == ["clear", "backward_single_pass", "reduce"]
    assert kernels("backward", "chunked") == ["summarise_adjoints", "carry_adjoints", "backward", "reduce"]


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_every_grid_is_within_the_limits(operation: str) -> None:
    for B, T, C in [(1, 1, 1), (200_000, 1, 1), (1, 10**9, 64), (70_000, 300, 70)]:
        launches = _launches(operation, B, T, C)
        for launch in launches:
            x, y, z = launch["grid"]
            assert 1 <= x < 2**31 and 1 <= y <= 65535 and 1 <= z <= 65535
            assert launch["block"][1:] == (1, 1) and 1 <= launch["block"][0] <= 1024
        main = [launch["grid"] for launch in launches if launch["kernel"].startswith(operation)]
        assert sum(z for _, _, z in main) == B or main == [[B * -(-C // 64) * main[0][0] // (B * -(-C // 64)), 1, 1]]


def test_a_single_pass_has_no_more_signals_than_its_kernels_can_count() -> None:
    most = {"schedule": "single_pass", "spans": 1, "limits": {**H100, "multiprocessors": 10**9}}
    fits = _introspection.plan_cuda("forward", "bfloat16", 65535, 65535 * 32, 64, **most)
    assert fits["signal_count"] == 65536 * 65535 < 2**32
    with pytest.raises(ValueError, match="schedule: a single pass has more signals than 32 bits can count"):
        _introspection.plan_cuda("forward", "bfloat16", 65535, 65535 * 32, 65, **most)
    left_to_the_plan = _introspection.plan_cuda(
        "forward", "bfloat16", 65535, 65535 * 32, 65, **{**most, "schedule": None}
    )
    assert left_to_the_plan["schedule"] == "chunked" and "more signals than" in left_to_the_plan["reason"]
    # Also where the product of tiles, chunks and sequences leaves 64 bits.
    with pytest.raises(ValueError, match="more signals than 32 bits can count"):
        _introspection.plan_cuda("backward", "float32", 60000, 64 * 60000, 64 * (2**31 - 1), schedule="single_pass")


def test_what_no_grid_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="C has 2147483648 tiles of channels, a grid has 2147483647 blocks at most"):
        _introspection.plan_cuda("forward", "bfloat16", 1, 1, 64 * 2**31)
    strides = {f"{name}_stride": 0 for name in ("k", "v", "r", "state_batch", "state_row", "state_channel")}
    arguments: dict[str, Any] = {"w": 0, "u": 0, "w_dtype": "float32", "u_dtype": "float32", **strides}
    (step,) = _introspection.cuda_launches("step", "bfloat16", 256, 1, 2**31 - 1, arguments)
    assert step["grid"] == (2**31 - 1, 1, 1)
    with pytest.raises(ValueError, match="549755813888 elements are more than a grid can hold"):
        _introspection.cuda_launches("step", "bfloat16", 256, 1, 2**31, arguments)
