"""`make gpu-check` itself, as far as a CPU can tell: its stages and their outcomes."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Stage

pytest.importorskip("rwkv_kernels._C", reason="the extension is not built")


def _python(name: str, code: str, limit: int = 60, why_not: str | None = None) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit, why_not=why_not)


def test_a_failing_stage_fails_the_check_but_not_the_stages_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = [
        _python("broken", "raise SystemExit(3)"),
        _python("endless", "import time; time.sleep(60)", limit=1),
        _python("elsewhere", "", why_not="not here"),
        _python("fine", ""),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: stages)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--results", str(tmp_path)])
    assert gpu_check.main() == 1
    record = json.loads((tmp_path / "check.json").read_text())
    outcomes = [stage["outcome"] for stage in record["tables"][0]["rows"]]
    assert outcomes == ["failed with exit status 3", "failed to end within 1 s", "skipped: not here", "passed"]
    assert record["environment"]["torch"] == torch.__version__

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
        record = json.loads((tmp_path / "check.json").read_text())
        return {stage["stage"]: stage["outcome"] for stage in record["tables"][0]["rows"]}

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
    assert list(stages) == ["build", "suite", *gpu_check.BENCHMARKS, "stress", "memcheck", "racecheck"]
    assert stages["build"].environment == {"TORCH_CUDA_ARCH_LIST": "9.0"}
    assert all(stage.why_not is None for stage in stages.values())
    for name in ("suite", "memcheck", "racecheck", "stress"):
        assert "--require-backend=cuda" in stages[name].command
    assert stages["racecheck"].command[:3] == [str(tmp_path / "compute-sanitizer"), "--tool", "racecheck"]
    assert "--peer=other=file.py" in stages["peers"].command
