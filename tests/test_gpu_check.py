"""`make gpu-check` itself, as far as a CPU can test it: its stages, their order, outcomes and end."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import stage
import torch
from stage import Stage

from benchmarks import CANNOT_RUN, ROOT, counters
from benchmarks.device import Device
from benchmarks.records import Record

pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")


def _python(name: str, code: str, limit: int = 60, why_not: str | None = None) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit, why_not=why_not)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the check with these stages and options; returns its exit status and the outcomes in its record."""

    def run(stages: list[Stage], *options: str) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr(gpu_check, "stages", lambda *_: stages)
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--results", str(tmp_path), *options])
        status = gpu_check.main()
        rows = json.loads((tmp_path / "check.json").read_text())["tables"][0]["rows"]
        return status, {row["stage"]: row["outcome"] for row in rows}

    return run


def test_a_failing_stage_fails_the_check_but_not_the_stages_after_it(check: Any, tmp_path: Path) -> None:
    fine = [_python("elsewhere", "", why_not="not here"), _python("unable", "exit(77)"), _python("fine", "")]
    broken = [_python("broken", "raise SystemExit(3)"), Stage("sanitizer", ["no-such-program"], 9)]
    expected = {
        "elsewhere": "skipped: not here",
        "unable": "skipped: it cannot run here, and says why",
        "fine": "passed",
    }
    assert check(fine) == (0, expected)
    failures = {"broken": "failed with exit status 3", "sanitizer": "failed: there is no no-such-program"}
    assert check([*broken, *fine]) == (1, {**expected, **failures})
    assert json.loads((tmp_path / "check.json").read_text())["environment"]["torch"] == torch.__version__


def test_a_failed_build_ends_the_check(check: Any) -> None:
    stages = [_python("build", "exit(1)"), _python("tests", "")]
    assert check(stages) == (1, {"build": "failed with exit status 1"})


def test_what_does_not_fit_into_the_budget_is_left_for_another_call(
    check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [_python("build", ""), _python("long", "", limit=500), _python("short", "", limit=9)]
    status, outcomes = check(stages, "--budget", "100")
    assert status == 0 and (outcomes["build"], outcomes["short"]) == ("passed", "passed")
    assert outcomes["long"].startswith("skipped: 500 s no longer fit into the budget of 100 s, of which ")
    assert 'make gpu-check NO_BUILD=1 ONLY="long"' in capsys.readouterr().out
    # The later call keeps the outcomes of the earlier one.
    passed = dict.fromkeys(["build", "long", "short"], "passed")
    assert check(stages, "--budget", "600", "--only", "long") == (0, passed)
    assert check(stages, "--only", "longest")[0] == 2
    assert "no stage is called longest" in capsys.readouterr().err


def test_a_stage_at_its_limit_is_interrupted_and_keeps_what_it_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The benchmark in it saves after every case and ends by itself."""
    code = (
        "import sys, time, torch; from benchmarks import __main__ as main, op\n"
        "def measure(case, device):\n    if case.shape[1] == 1: time.sleep(60)\n    case.errors['cpu'] = 0.0\n"
        "op.Case.measure = measure; op.Case.rows = lambda case: [{'shape': str(case.shape)} for _ in case.errors]\n"
        f"sys.exit(main.main(['op', '--device', 'cpu', '--smoke', '--results', {str(tmp_path)!r}]))"
    )
    assert stage.run(_python("op", code, limit=8))["outcome"] == "failed to end within 8 s"
    record = json.loads((tmp_path / "op.json").read_text())
    assert record["tables"][0]["rows"] == [{"shape": "(2, 130, 64)"}] * 2
    assert record["failures"] == ["interrupted: what it had measured until then is kept"]
    assert "| (2, 130, 64) |" in capfd.readouterr().out


def _is_gone(number: str) -> bool:
    status = Path(f"/proc/{number}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


@NEEDS_PROC
def test_the_end_of_a_stage_is_the_end_of_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In any group and session, ignoring interrupts; and a stage that does not end prints its stacks."""
    monkeypatch.setattr(stage, "PATIENCE", 0.5)
    code = f"""
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
for name, how in [("same", {{}}), ("group", {{"preexec_fn": os.setpgrp}}), ("session", {{"start_new_session": True}})]:
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, **how)
    child.stdout.readline()
    (pathlib.Path({str(tmp_path)!r}) / name).write_text(str(child.pid))
def waits_for_ever(): time.sleep(60)
waits_for_ever()
"""
    assert stage.run(_python("parent", code, limit=4))["outcome"] == "failed to end within 4 s"
    children = [path.read_text() for path in tmp_path.iterdir()]
    assert len(children) == 3 and all(_is_gone(child) for child in children)
    assert "in waits_for_ever" in capfd.readouterr().err


@NEEDS_PROC
def test_what_a_stage_leaves_running_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = f"import subprocess; print(subprocess.Popen(['sleep', '60']).pid, file=open({str(note)!r}, 'w'))"
    assert stage.run(_python("parent", code))["outcome"] == "passed"
    assert _is_gone(note.read_text().strip())


def test_without_a_gpu_the_check_for_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--results", str(tmp_path)])
    assert gpu_check.main() == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_stages_for_a_gpu_come_by_importance_and_name_what_they_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stages = {each.name: each for each in gpu_check.stages("cuda", tmp_path, ["other=file.py"])}
    sanitized = ["program", "program_runs", *gpu_check.SANITIZERS]
    first_light = [f"first_light_{name}" for name in ("cuda", "triton")]
    assert list(stages) == [
        *("build", *first_light, "stress", "op", "counters"),
        *(*sanitized, "tests", "peers", "latency"),
    ]
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "-lineinfo" in stages["build"].environment["NVCC_APPEND_FLAGS"]
    assert all(each.why_not is None and each.limit < 600 for each in stages.values())
    assert all("--require-backend=cuda" in stages[name].command for name in [*first_light, "stress", "tests"])
    assert stages["racecheck"].command[:3] == [str(tmp_path / "compute-sanitizer"), "--tool", "racecheck"]
    assert stages["program"].command[-1] == "9.0"
    assert "--peer=other=file.py" in stages["peers"].command
    # check.json and the benchmarks' records.
    assert 1 + len(gpu_check.FIRST_BENCHMARKS) + len(gpu_check.LAST_BENCHMARKS) <= 8


def test_a_build_made_elsewhere_is_taken_if_it_loads() -> None:
    builds = {device: next(gpu_check.stages(device, Path(), [], build=False)) for device in ("cpu", "cuda")}
    assert stage.run(builds["cpu"])["outcome"] == "passed"
    if not torch.cuda.is_available():
        assert stage.run(builds["cuda"])["outcome"] == "failed with exit status 1"


NCU = """==PROF== Connected to process 1234 (python3)
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","1234","python3","host","void wkv::<unnamed>::wkv_kernel<wkv::Forward<wkv::Bfloat16>>(T1::Params)","1","7",\
"(128, 1, 1)","(12, 8, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ns","1,234.50"
"0","1234","python3","host","void wkv::<unnamed>::wkv_kernel<wkv::Forward<wkv::Bfloat16>>(T1::Params)","1","7",\
"(128, 1, 1)","(12, 8, 1)","0","9.0","Command line profiler metrics","launch__registers_per_thread",\
"register/thread","90"
"1","1234","python3","host","step","1","7","(256, 1, 1)","(3, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","ns","n/a"
==PROF== Disconnected from process 1234
"""


def test_what_ncu_has_counted_is_a_row_for_every_kernel() -> None:
    forward, step = counters.read(NCU.splitlines())
    assert forward["kernel"] == "forward bfloat16" and forward["grid"] == "(12, 8, 1)"
    assert forward["time, ns"] == 1234.5 and forward["registers"] == 90
    assert (step["launch"], step["kernel"]) == ("1", "step") and step["time, ns"] == "n/a"


@pytest.mark.parametrize(
    ("answer", "status", "ends_with"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, SystemExit),
        ("==ERROR== Failed to find metric", 1, RuntimeError),
        (NCU, 0, None),
        (None, 0, SystemExit),
    ],
    ids=["no_permission", "no_metric", "counted", "no_ncu"],
)
def test_counters_are_skipped_where_they_cannot_be_read(
    answer: str | None, status: int, ends_with: type | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A script takes the place of ncu."""
    if answer is not None:
        (tmp_path / "answer").write_text(answer)
        log = 'while [ "$1" != --log-file ]; do shift; done; cp "$answer" "$2"'
        (tmp_path / "ncu").write_text(f"#!/bin/sh\nanswer={tmp_path}/answer\n{log}\nexit {status}\n")
        (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    record = Record("counters", tmp_path)
    with pytest.raises(ends_with) if ends_with else nullcontext() as end:
        counters.run(Device("cpu", smoke=True), record)
    assert len(record.tables) == (ends_with is None) and all(len(table.rows) == 2 for table in record.tables)
    assert ends_with is not SystemExit or (end and end.value.code == CANNOT_RUN)


def test_what_is_profiled_runs() -> None:
    counters.launch_all("smoke")


def test_a_python_without_torch_gets_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "tools/gpu_check.py"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "has no torch: `make setup`" in result.stderr


def test_the_check_ends_what_it_started_when_it_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "child"
    forever = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_check; from stage import Stage\n"
        f"code = {forever!r}\n"
        "gpu_check.stages = lambda *_: [Stage('long', [sys.executable, '-c', code], 50)]\n"
        f"sys.argv = ['', '--device', 'cpu', '--results', {str(tmp_path)!r}]; gpu_check.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(300):
        if note.exists() and note.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1 and _is_gone(note.read_text())
