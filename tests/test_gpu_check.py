"""`make gpu-check` itself, as far as a CPU can tell: stages and outcomes, the checks before the clock, the tables."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rwkv_kernels
from benchmarks import gpu_check
from benchmarks.gpu import crossover, operations, peers, plots
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import Device
from benchmarks.gpu_check import Stage
from benchmarks.plans import SCHEDULES

pytest.importorskip("rwkv_kernels._C", reason="the extension is not built")

CPU = Device("cpu")


def _python(name: str, code: str, limit: int = 60, why_not: str | None = None) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit, why_not=why_not)


def test_a_failing_stage_fails_the_check_but_not_the_stages_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = [
        _python("broken", "raise SystemExit(3)"),
        _python("endless", "import time; time.sleep(60)", limit=1),
        _python("elsewhere", "", why_not="not here"),
        _python("fine", f"open({str(tmp_path / 'benchmark.json')!r}, 'w').write('[1]')"),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: stages)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--results", str(tmp_path)])
    assert gpu_check.main() == 1
    record = json.loads((tmp_path / "record.json").read_text())
    outcomes = [stage["outcome"] for stage in record["stages"]]
    assert outcomes == ["failed with exit status 3", "failed to end within 1 s", "skipped: not here", "passed"]
    assert record["benchmark"] == [1] and record["environment"]["torch"] == torch.__version__

    monkeypatch.setattr(gpu_check, "stages", lambda *_: stages[2:])
    assert gpu_check.main() == 0


def test_a_failed_build_ends_the_check_and_stages_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def outcomes(build: str, *options: str) -> dict[str, str]:
        stages = [_python("build", build), Stage("sanitizer", ["no-such-program"], 9), _python("suite", "")]
        monkeypatch.setattr(gpu_check, "stages", lambda *_: stages)
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--results", str(tmp_path), *options])
        assert gpu_check.main() == (0 if "--only" in options else 1)
        record = json.loads((tmp_path / "record.json").read_text())
        return {stage["stage"]: stage["outcome"] for stage in record["stages"]}

    assert outcomes("raise SystemExit(1)") == {"build": "failed with exit status 1"}
    assert outcomes("", "--only", "suite") == {"build": "passed", "suite": "passed"}
    assert outcomes("")["sanitizer"] == "failed: there is no no-such-program"


def test_the_end_of_a_stage_is_the_end_of_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = (
        "import pathlib, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(60)']); pathlib.Path({str(note)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    assert gpu_check.run(_python("parent", code, limit=3))["outcome"] == "failed to end within 3 s"
    status = Path(f"/proc/{note.read_text()}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def test_without_a_gpu_the_check_for_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--results", str(tmp_path)])
    assert gpu_check.main() == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_stages_for_a_gpu_name_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stages = {stage.name: stage for stage in gpu_check.stages("cuda", tmp_path, ["other=file.py"])}
    assert list(stages) == ["build", "suite", "benchmark", "stress", "memcheck", "racecheck"]
    assert stages["build"].environment == {"TORCH_CUDA_ARCH_LIST": "9.0"}
    assert all(stage.why_not is None for stage in stages.values())
    for name in ("suite", "memcheck", "racecheck", "stress"):
        assert "--require-backend=cuda" in stages[name].command
    assert stages["racecheck"].command[:3] == [str(tmp_path / "compute-sanitizer"), "--tool", "racecheck"]
    assert "--peer=other=file.py" in stages["benchmark"].command


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
    assert problem.check(operations.function_of("cpu", None)) < 1e-5
    with pytest.raises(AssertionError, match="of the largest element"):
        problem.check(function)


@pytest.fixture
def a_cuda_backend_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The CPU's kernel under the name "cuda", with the plans for an H100; returns what will be forced."""
    module = operations.extension.module
    forced: list[str | None] = []
    plan = module.plan_cuda

    def plan_for_the_first_gpu(*problem: object, limits: int, schedule: str | None) -> object:
        assert limits == 0
        return plan(*problem, schedule=schedule)

    monkeypatch.setattr(module, "plan_cuda", plan_for_the_first_gpu)
    monkeypatch.setattr(module, "force_cuda_plan", lambda schedule=None, **_: forced.append(schedule), raising=False)
    monkeypatch.setattr(operations, "backends", lambda device: ["cuda"])
    wkv = rwkv_kernels.wkv
    monkeypatch.setattr(rwkv_kernels, "wkv", lambda *given, backend: wkv(*given, backend="cpu"))
    return forced


def test_every_schedule_is_measured_and_drawn(a_cuda_backend_on_the_cpu: list[str | None], tmp_path: Path) -> None:
    report = Report(tmp_path)
    rows = operations.run(CPU, report, bandwidth=1e9)
    assert {row["schedule"] for row in rows} == {"auto", "serial", "chunked", "single_pass"}
    assert {row["_plan"]["schedule"] for row in rows} == {"serial", "chunked", "single_pass"}
    # What was forced is always undone.
    assert a_cuda_backend_on_the_cpu[1::2] == [None] * (len(a_cuda_backend_on_the_cpu) // 2)
    report.add("operations", operations.TITLE, rows)

    rows = crossover.run(CPU, report)
    assert {row["planned"] for row in rows} == {"serial", "single_pass"}
    for row in rows:
        fastest = min(row[f"{schedule}, ms"] for schedule in SCHEDULES)
        assert row["lost"] == pytest.approx(row[f"{row['planned']}, ms"] / fastest - 1)
    report.add("crossover", crossover.TITLE, rows)
    assert not report.failures

    record = json.loads((tmp_path / "benchmark.json").read_text())
    plots.draw(record["tables"], tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"operations.png", "crossover.png"}


def test_a_failing_case_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check(problem: Problem, function: object) -> float:
        assert problem.k.shape[1] == 1, "wrong"
        return 0.0

    monkeypatch.setattr(Problem, "check", check)
    report = Report(tmp_path)
    rows = operations.run(CPU, report, bandwidth=1e9)
    assert {row["shape"] for row in rows} == {"2, 1, 64"}
    assert len(report.failures) == 2 and "AssertionError: wrong" in report.failures[0]


def test_peers_come_from_files_and_their_faults_are_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exact.py").write_text(
        "from rwkv_kernels import wkv as ours\ndef wkv(w, u, k, v):\n    return ours(w, u, k, v, backend='reference')\n"
    )
    (tmp_path / "wrong.py").write_text("def wkv(w, u, k, v):\n    return v + 0 * (w + u + k)\n")
    (tmp_path / "refusing.py").write_text("def wkv(w, u, k, v):\n    raise ValueError('too long')\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    rows = peers.run(CPU, {path.stem: path for path in tmp_path.glob("*.py")})
    errors = {row["who"]: row["error"] for row in rows if row["dtype"] == "float32"}
    assert errors["exact"] < 1e-5 and errors["wrong"] > 0.1
    assert {"refusing", "broken"}.isdisjoint(errors)
    output = capsys.readouterr().out
    assert "peer refusing at (2, 16, 32), torch.float32: ValueError: too long" in output
    assert "peer broken: not here (ModuleNotFoundError" in output
