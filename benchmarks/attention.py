"""Time and memory of a token mixer against T, the same slot filled with WKV, attention, AFT and an LSTM."""

import math
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import mixers
from benchmarks.device import Call, Device, powers_of_two, timed
from benchmarks.records import Record, Row

TITLE = "A token mixer against T, B = 1"
TITLE_OF_GROWTH = "Growth: time ~ T^p and memory ~ T^q, fitted to the longest {lengths} lengths"
TITLE_OF_CROSSOVER = "From which T on WKV is faster, of the lengths that both were measured at"

WIDTH = {"cuda": 1024, "cpu": 256, "smoke": 32}
# On GPUs, torch's fast attention needs 16 bits.
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32, "smoke": torch.float32}
SHORTEST = 128
LONGEST = {"cuda": 2**17, "cpu": 2**15, "smoke": 256}
# Seconds of a call that ends a sweep: the next one would take twice or four times as long.
LONG_ENOUGH = {"cuda": 0.1, "cpu": 0.2, "smoke": 0.1}
PATIENCE = 20.0  # seconds for the runs of one call: enough for 20 of the next length, four times as long
FITTED = 3
PASSES = ("forward", "training step")


def run(device: Device, record: Record) -> None:
    """T doubles until a mixer takes too long or does not fit; then exponents are fitted, and the crossovers named."""
    _check_against_each_other()
    rows: list[Row] = []
    for name in _offered(device):
        for operation in PASSES:
            with record.attempt(f"{name}, {operation}"):
                for row in _sweep(device, name, operation):
                    rows.append(row)
                    record.add(TITLE, ["mixer", "pass", "T"], rows)
                    print(f"{name}, {operation}, T = {row['T']}: {row['ms']:.3g} ms", flush=True)
    series = {
        (name, operation): [row for row in rows if (row["mixer"], row["pass"]) == (name, operation)]
        for name in mixers.NAMES
        for operation in PASSES
    }
    growth = [_growth(own) for own in series.values() if own]
    record.add(TITLE_OF_GROWTH.format(lengths=FITTED), [], growth)
    crossovers = [
        _crossover(series["WKV", operation], own)
        for (name, operation), own in series.items()
        if name != "WKV" and own and series["WKV", operation]
    ]
    record.add(TITLE_OF_CROSSOVER, [], crossovers)


def prepare_pass(name: str, operation: str, T: int, C: int, dtype: torch.dtype) -> Call:
    """A call of a mixer on torch's default device: forward alone, or with gradients of the input and all parameters."""
    mixer = mixers.make(name, T, C).to(dtype)
    x, gy = torch.randn(1, T, C, dtype=dtype, requires_grad=True), torch.randn(1, T, C, dtype=dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return mixer(x)  # type: ignore[no-any-return]

    def training_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixer(x), (x, *mixer.parameters()), gy)

    return forward if operation == "forward" else training_step


def _sweep(device: Device, name: str, operation: str) -> Iterator[Row]:
    """Rows for T = 128, 256, ..."""
    C, dtype = WIDTH[device.scale], DTYPE[device.scale]
    for T in powers_of_two(SHORTEST, LONGEST[device.scale]):
        try:
            with device.default():
                call = prepare_pass(name, operation, T, C, dtype)
            samples = device.patiently({name: call}, PATIENCE)[name]
            peak = device.peak_bytes(prepare_pass, name, operation, T, C, dtype)
        except (torch.OutOfMemoryError, MemoryError) as error:
            print(f"{name}, {operation}: T = {T} does not fit ({type(error).__name__})", flush=True)
            break
        memory = {"MB": peak / 1e6} if peak is not None else {}
        yield {"mixer": name, "pass": operation, "T": T, **timed(samples), **memory}
        if statistics.median(samples) > LONG_ENOUGH[device.scale]:
            break


def _offered(device: Device) -> list[str]:
    """The mixers that this device and torch have; prints the reason for each that is missing."""
    offered = []
    for name in mixers.NAMES:
        try:
            with device.default():
                prepare_pass(name, "training step", SHORTEST, WIDTH[device.scale], DTYPE[device.scale])()
        except RuntimeError as refusal:
            print(f"{name}: not offered here ({str(refusal).splitlines()[0]})", flush=True)
        else:
            offered.append(name)
    return offered


def exponent(rows: list[Row], column: str) -> float | str:
    """p of column ~ T^p, a straight line through logarithms at the longest lengths."""
    # A call that is too small for the system's count of pages takes no memory.
    longest = [row for row in rows if row.get(column, 0) > 0][-FITTED:]
    if len(longest) < 2:
        return "-"
    logarithms = [[math.log(row[name]) for row in longest] for name in ("T", column)]
    return statistics.linear_regression(*logarithms).slope


def _growth(rows: list[Row]) -> Row:
    return {
        "mixer": rows[0]["mixer"],
        "pass": rows[0]["pass"],
        "up to T": rows[-1]["T"],
        "of time": exponent(rows, "ms"),
        "of memory": exponent(rows, "MB"),
    }


def _crossover(ours: list[Row], others: list[Row]) -> Row:
    our_time = {row["T"]: row["ms"] for row in ours}
    shared = [(row["T"], row["ms"] / our_time[row["T"]]) for row in others if row["T"] in our_time]
    last_slower = max((T for T, ratio in shared if ratio <= 1), default=0)
    faster_from = next((T for T, _ in shared if last_slower < T), f"not up to {shared[-1][0]}")
    return {
        "pass": others[0]["pass"],
        "than": others[0]["mixer"],
        "from T": faster_from,
        "at T": shared[-1][0],
        "times faster there": shared[-1][1],
    }


def _check_against_each_other() -> None:
    """Compares mixers in float64 where they are cases of each other: each must match its name."""
    torch.manual_seed(0)
    T, C = 48, 2 * mixers.HEAD_CHANNELS
    r, k, v = torch.randn(3, 1, T, C, dtype=torch.float64)

    # Each weight is written out, [T, T, C].
    def weighted_mean(logits: Tensor) -> Tensor:
        past = torch.ones(T, T, dtype=torch.bool).tril()[..., None]
        return (logits.masked_fill(~past, -torch.inf).softmax(1) * v).sum(1)[None]

    def agree(found: Callable[[Tensor, Tensor, Tensor], Tensor], expected: Tensor) -> None:
        torch.testing.assert_close(found(r, k, v), expected, rtol=1e-9, atol=1e-9)

    with torch.no_grad():
        aft = mixers.AftFull(T, C).double()
        aft.biases.normal_()
        agree(aft, torch.sigmoid(r) * weighted_mean(aft.biases[..., None] + k))
        agree(mixers.AftSimple(T, C), torch.sigmoid(r) * weighted_mean(k.expand(T, T, C)))
        # WKV is AFT whose biases fall with the distance, except for the present step.
        ours = mixers.Wkv(T, C).double()
        ours.u.normal_()
        distance = (torch.arange(T)[:, None] - torch.arange(T))[..., None]
        falling = torch.where(distance > 0, -ours.w.exp() * (distance - 1), ours.u)
        agree(ours, torch.sigmoid(r) * weighted_mean(falling + k))
        naive = mixers.NaiveAttention(T, C)
        q, keys, values = (x.unflatten(-1, (2, -1))[0] for x in (r, k, v))
        scores = torch.einsum("thd,shd->hts", q, keys) / math.sqrt(mixers.HEAD_CHANNELS)
        weights = scores.exp().tril()
        expected = torch.einsum("hts,shd->thd", weights / weights.sum(-1, keepdim=True), values).flatten(1)[None]
        agree(naive, expected)
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            agree(mixers.TorchAttention(T, C, backend), expected)
