"""The benchmarks themselves: checks before the clock starts, records, and conclusions from them."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import rwkv_kernels
from benchmarks import (
    CANNOT_RUN,
    ROOT,
    attention,
    bidirectional,
    footprint,
    latency,
    op,
    packed,
    peers,
    plots,
    records,
    small_calls,
)
from benchmarks.__main__ import main
from benchmarks.device import Device, powers_of_two, timed
from benchmarks.problem import Problem, function_of
from benchmarks.records import Record, Row

pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")

SMOKE = Device("cpu", smoke=True)


@pytest.mark.parametrize("wrong", ["slightly", "nan", "in_the_last_channel", "in_a_gradient"])
def test_a_wrong_result_is_seen_before_it_is_timed(wrong: str) -> None:
    def function(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = rwkv_kernels.wkv(w, u, k, v, backend="cpu")
        if wrong == "slightly":
            return y * 1.01
        if wrong == "in_a_gradient":
            return y - 0.5 * (u - u.detach())
        y = y.clone()
        y[0, 3, -1] += torch.nan if wrong == "nan" else 1.0
        return y

    problem = Problem((2, 70, 33), torch.float32)
    assert problem.check(function_of("cpu")) < 1e-5
    with pytest.raises(AssertionError, match="of the largest element"):
        problem.check(function)


def test_every_registered_backend_is_measured_with_its_plan_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The CPU's kernel under the names "cuda" and "new", which no benchmark mentions, on a seeming H100."""
    wkv, actual = rwkv_kernels.wkv, {"cuda": "cpu", "new": "cpu", "reference": "reference"}
    infos = [rwkv_kernels.BackendInfo(name, True, None) for name in actual]
    monkeypatch.setattr(rwkv_kernels, "backends", lambda: infos)
    monkeypatch.setattr(
        rwkv_kernels, "wkv", lambda *given, backend, **more: wkv(*given, backend=actual[backend], **more)
    )
    monkeypatch.setattr(footprint, "peak_bytes", lambda *_: None)  # another process would not have this stand-in
    shared = {"shared_memory_per_block_optin": 232448, "shared_memory_per_multiprocessor": 233472}
    h100 = SimpleNamespace(multi_processor_count=132, major=9, minor=0, **shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    record = Record("op", tmp_path)
    op.run(SMOKE, record)
    rows = record.tables[0].rows
    for dtype in ("float32", "bfloat16"):
        for operation in ("forward", op.WITH_CHECKPOINTS, "backward"):
            chosen = [row for row in rows if (row["dtype"], row["operation"]) == (dtype, operation)]
            assert [(row["shape"], row["gate"], row["backend"]) for row in chosen] == [
                (shape, gate, backend)
                for shape in ("2, 130, 64", "2, 1, 64")
                for gate in op.GATES
                for backend in ("cuda", "new")
            ]
            plans = [row["_plan"].get("chunks") for row in chosen if row["gate"] == "none"]
            # Of 64 steps, and forward of 128 and 256.
            assert plans == [3 if operation == "backward" else 2 if dtype == "float32" else 1, None, 1, None]
    assert not record.failures
    assert plots.draw(tmp_path) == [tmp_path / "op.png"]


@pytest.mark.parametrize("wrong", ["forgotten", "in_its_gradient"])
def test_a_wrong_gate_is_seen_before_it_is_timed(wrong: str) -> None:
    def function(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        y = rwkv_kernels.wkv(w, u, k, v, backend="cpu")
        return y + 0 * r if wrong == "forgotten" else torch.sigmoid(r) * y + 0.1 * (r - r.detach())

    problem = Problem((2, 70, 33), torch.float32, gated=True)
    for gate in ("operator", "torch"):
        assert problem.check(op.gated_by(gate, "cpu")) < 1e-5
    with pytest.raises(AssertionError, match="of the largest element"):
        problem.check(function)


def test_a_gate_adds_its_tensors_to_the_least_traffic() -> None:
    case = op.Case((2, 130, 64), torch.float32)
    case.measure(SMOKE)
    for row in case.rows():
        tensors = {"forward": 3, op.WITH_CHECKPOINTS: 3, "backward": 5}[row["operation"]]
        if row["gate"] != "none":
            tensors += 2 if row["operation"] == "backward" else 1
        assert row["GB/s"] * row["µs"] * 1e3 == pytest.approx(tensors * 2 * 130 * 64 * 4), row


def test_lengths_with_a_heavy_tail_are_the_same_in_every_run() -> None:
    lengths = packed.draw_lengths(2**14)
    assert lengths == packed.draw_lengths(2**14) and sum(lengths) == 2**14
    assert max(lengths) == packed.LONGEST > 8 * sum(lengths) / len(lengths)


def test_every_way_to_compute_sequences_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "peak_bytes", lambda *_: 10**6)
    record = Record("packed")
    packed.run(SMOKE, record)
    assert not record.failures
    rows = record.tables[0].rows
    for operation in ("forward", "backward"):
        for dtype in ("float32", "bfloat16"):
            own = [row for row in rows if (row["operation"], row["dtype"], row["backend"]) == (operation, dtype, "cpu")]
            lengths = packed.draw_lengths(2**9)
            padded = len(lengths) * max(lengths)
            steps = {"packed": 2**9, "padded": padded, "one call each": 2**9, "rectangle": 2**9}
            assert {row["way"]: row["steps, padding included"] for row in own} == steps
            assert own[0]["of packed"] == 1
            of_padding = 3 * padded * 64 * (4 if dtype == "float32" else 2)
            assert own[1]["MB"] == pytest.approx((10**6 + of_padding) / 1e6)


@pytest.mark.parametrize("way", ["packed", "one call each"])
def test_wrong_sequences_are_seen_before_they_are_timed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wkv = rwkv_kernels.wkv

    def wrong(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, backend: str, **boundaries: Tensor) -> Tensor:
        return wkv(w, u, k, v if backend == "reference" else v.roll(1, dims=1), backend=backend, **boundaries)

    monkeypatch.setattr(rwkv_kernels, "wkv", wrong)
    tried = packed.Way(way, packed.draw_lengths(2**9), "cpu")
    with pytest.raises(AssertionError, match="of the largest element"):
        tried.problem(64, torch.float32).check(tried.function())


def test_a_failing_case_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(problem: Problem, function: object) -> float:
        assert problem.k.shape[1] == 1, "wrong"
        return 0.0

    monkeypatch.setattr(Problem, "check", check)
    monkeypatch.setattr(footprint, "peak_bytes", lambda *_: None)
    record = Record("op")
    op.run(SMOKE, record)
    assert {row["shape"] for row in record.tables[0].rows} == {"2, 1, 64"}
    assert len(record.failures) == 2 and "AssertionError: wrong" in record.failures[0]


def test_peers_come_from_files_and_their_faults_are_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exact.py").write_text(
        "from rwkv_kernels import wkv as ours\ndef wkv(w, u, k, v):\n    return ours(w, u, k, v, backend='reference')\n"
    )
    (tmp_path / "wrong.py").write_text("def wkv(w, u, k, v):\n    return v + 0 * (w + u + k)\n")
    (tmp_path / "refusing.py").write_text("def wkv(w, u, k, v):\n    raise ValueError('too long')\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    record = Record("peers")
    peers.run(SMOKE, record, {path.stem: path for path in tmp_path.glob("*.py")})
    errors = {row["who"]: row["error"] for row in record.tables[0].rows if row["dtype"] == "float32"}
    assert errors["exact"] < 1e-5 and errors["wrong"] > 0.1
    assert {"refusing", "broken"}.isdisjoint(errors)
    output = capsys.readouterr().out
    assert "peer refusing at (2, 16, 32), torch.float32: ValueError: too long" in output
    assert "peer broken: not here (ModuleNotFoundError" in output


SLOWER = """
import time
_step = wkv_step
def wkv_step(*arguments, **options):
    return time.sleep(1e-2) or _step(*arguments, **options)
"""


def test_a_slower_tree_is_seen_beside_this_one(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rwkv_kernels", tmp_path / "rwkv_kernels")
    with (tmp_path / "rwkv_kernels" / "__init__.py").open("a") as file:
        file.write(SLOWER)
    record = Record("latency")
    latency.run(SMOKE, record, tmp_path)
    times = {row["call"]: (row["least here, µs"], row["least there, µs"]) for row in record.tables[0].rows}
    here, there = times["wkv_step at (1, 768)"]
    assert there - here > 5_000
    here, there = times["torch.ops: wkv_step at (1, 768)"]
    assert there < 5_000


def test_a_tree_without_a_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_answer", lambda _: {"where": rwkv_kernels.__file__, "seconds": 1.0})
    with pytest.raises(RuntimeError, match="has no package of its own"):
        latency._import_seconds(None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["wkv", "wkv_step"])
def test_a_small_call_that_is_wrong_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_calls.check("cpu")
    right = getattr(rwkv_kernels, wrong)

    def slightly(*given: Tensor, backend: str, **options: Tensor | None) -> Tensor:
        return right(*given, backend=backend, **options) * (1.0 if backend == "reference" else 1.05)  # type: ignore[no-any-return]

    monkeypatch.setattr(rwkv_kernels, wrong, slightly)
    with pytest.raises(AssertionError, match=f"^{wrong}"):
        small_calls.check("cpu")
    record = Record("latency")
    latency.run(SMOKE, record)
    assert not any(row["what"].startswith("cpu: ") for row in record.tables[0].rows) and len(record.failures) == 1


def hold(megabytes: int, megabytes_in_passing: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        torch.ones(megabytes_in_passing * 2**20, dtype=torch.int8)
        return torch.ones(megabytes * 2**20, dtype=torch.int8)

    return call


def test_memory_is_what_a_call_holds_at_its_worst() -> None:
    if not footprint.CLEAR_REFS.exists():
        pytest.skip("this system does not report a process's peak memory")
    for held, in_passing in [(40, 10), (10, 40), (20, 20)]:
        peak = Device("cpu").peak_bytes(hold, held, in_passing)
        assert peak is not None and abs(peak / 2**20 - max(held, in_passing)) < 1


@pytest.mark.parametrize("mixer", ["Wkv", "AftFull", "AftSimple", "NaiveAttention", "TorchAttention"])
def test_a_wrong_mixer_is_seen_before_it_is_timed(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention._check_against_each_other()
    right = getattr(attention.mixers, mixer).forward
    monkeypatch.setattr(
        getattr(attention.mixers, mixer), "forward", lambda self, r, k, v: right(self, r, k, v.roll(1, dims=1))
    )
    with pytest.raises(AssertionError):
        attention._check_against_each_other()


@pytest.mark.parametrize("fault", ["in_y", "in_a_gradient"])
@pytest.mark.parametrize("who", ["_wkv", "_attention"])
def test_a_wrong_mixing_of_images_is_not_timed(who: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(bidirectional, who)

    def wrong(r: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        y: Tensor = right(r, k, v, *own)
        return 1.01 * y if fault == "in_y" else y + 0.01 * (k - k.detach())

    monkeypatch.setattr(bidirectional, who, wrong)
    record = Record("bidirectional")
    with pytest.raises(AssertionError, match="bi_wkv" if who == "_wkv" else "attention"):
        bidirectional.run(SMOKE, record)
    assert not record.tables


def test_images_of_all_sizes_have_as_many_tokens() -> None:
    record = Record("bidirectional")
    bidirectional.run(SMOKE, record)
    (table,) = record.tables
    cases = itertools.product(("5, 196, 64", "1, 1024, 64"), bidirectional.PASSES, ("bi_wkv, gated", "attention"))
    assert [(row["B, T, C"], row["pass"], row["who"]) for row in table.rows] == list(cases)
    assert not record.failures and all(row["of our time"] == 1 for row in table.rows[::2])


def test_growth_and_crossover_are_read_from_times() -> None:
    lengths = powers_of_two(128, 4096)
    assert lengths == [128, 256, 512, 1024, 2048, 4096]

    def series(name: str, milliseconds: list[float]) -> list[Row]:
        rows = zip(lengths, milliseconds, strict=True)
        return [{"mixer": name, "pass": "forward", "T": T, "ms": time, "MB": 0.5 * T} for T, time in rows]

    linear = series("WKV", [3e-3 * T for T in lengths])
    quadratic = series("attention", [5e-6 * T**2 for T in lengths])
    growth = attention._growth(quadratic)
    assert [growth[name] for name in ("mixer", "up to T")] == ["attention", 4096]
    assert [growth[name] for name in ("of time", "of memory")] == pytest.approx([2, 1])
    # 3e-3 T < 5e-6 T² from T = 600 on.
    assert attention._crossover(linear, quadratic)["from T"] == 1024
    assert attention._crossover(quadratic, linear)["from T"] == "not up to 4096"


def _record(folder: Path, seconds: dict[str, list[float]], name: str = "times", **place: str) -> Path:
    record = Record(name, folder)
    record.environment |= place
    record.add("times", ["what"], [{"what": what, **timed(samples)} for what, samples in seconds.items()])
    return folder / f"{name}.json"


def test_a_record_is_what_was_saved(tmp_path: Path) -> None:
    path = _record(tmp_path, {"a": [1.0, 2.0, 3.0]})
    record = Record.load(path)
    assert record.tables[0].rows == [{"what": "a", "ms": 2000.0, "spread": 1.0, "_seconds": [1.0, 2.0, 3.0]}]
    assert record.environment == records.environment()
    assert "Noisy: in 1 of 1 rows" in record.tables[0].markdown()
    assert main(["plots", str(tmp_path)]) == 0
    assert "| a | 2000 | 1 |" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("after", "verdict", "status"),
    [
        ([1.0, 1.01, 1.02, 1.03], "the same", 0),
        ([1.3, 1.31, 1.32, 1.33], "slower", 1),
        ([0.7, 0.71, 0.72, 0.73], "faster", 0),
        ([0.7, 1.25, 1.26, 1.9], "the same", 0),  # slower, but within the noise
        ([1.05, 1.051, 1.052, 1.053], "the same", 0),  # within the tolerance
        ([1.3], "too few to tell", 0),
        (None, "gone", 1),
    ],
)
def test_records_are_compared_beyond_their_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: list[float] | None, verdict: str, status: int
) -> None:
    before = _record(tmp_path / "before", {"a": [1.0, 1.01, 1.02, 1.03], "b": [1.0] * 4})
    new = _record(tmp_path / "after", {"b": [1.0] * 4, **({"a": after} if after else {})})
    capsys.readouterr()
    assert main(["compare", str(before), str(new)]) == status
    output = capsys.readouterr().out
    assert next(line for line in output.splitlines() if line.startswith("| a |")).endswith(f"{verdict} |")
    assert main(["compare", str(new), str(new)]) == 0


def test_what_cannot_be_compared_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _record(tmp_path / "before", {"a": [1.0]})
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    for after, why in [
        (_record(tmp_path, {"a": [1.0]}, processor="another"), "their processor differs"),
        (_record(tmp_path, {"a": [1.0]}, name="peers"), "the other of 'peers'"),
        (tmp_path / "other.json", "cannot be compared"),
        (tmp_path / "nowhere.json", "cannot be compared"),
    ]:
        assert main(["compare", str(before), str(after)]) == 2
        assert why in capsys.readouterr().out


def test_a_peer_may_be_wrong_but_not_we(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "function_of", lambda *_: lambda w, u, k, v: v + 0 * (w + u + k))
    record = Record("peers")
    peers.run(SMOKE, record, {})
    assert not record.tables and len(record.failures) == 2 and "off by" in record.failures[0]


def test_a_benchmark_runs_where_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["counters", "--device", "cpu"]) == CANNOT_RUN
    assert "counters runs on cuda, not on cpu" in capsys.readouterr().err
