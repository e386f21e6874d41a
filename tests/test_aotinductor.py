"""examples/aotinductor: a program without Python runs a model with the operators in it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_kernels import native

EXAMPLE = Path(__file__).parent.parent / "examples" / "aotinductor"

pytestmark = [
    pytest.mark.aotinductor,
    pytest.mark.skipif(native.operators.path is None, reason=str(native.operators.why_missing)),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH"),
]


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of export.py, and the program in build/run."""
    made = tmp_path_factory.mktemp("aotinductor")
    torch_cmake = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        [sys.executable, EXAMPLE / "export.py", made],
        ["cmake", "-S", EXAMPLE, "-B", made / "build", torch_cmake],
        ["cmake", "--build", made / "build"],
    ):
        result = _run(*command)
        assert result.returncode == 0, result.stdout
    return made


def test_a_program_without_python_runs_the_packaged_model(folder: Path) -> None:
    result = _run(folder / "build/run", native.operators.path, folder / "model.pt2", folder / "example.pt")
    assert result.returncode == 0, result.stdout
    whole, in_parts, python = result.stdout.splitlines()
    assert whole.startswith("whole: 4 outputs") and in_parts.startswith("in two parts: 4 outputs")
    assert python == "no Python in this process"


def test_the_program_sees_another_result(folder: Path, tmp_path: Path) -> None:
    example = torch.load(folder / "example.pt")
    example["outputs"][3][0, 0, 1, 5] += 1
    torch.save(example, tmp_path / "example.pt")
    result = _run(folder / "build/run", native.operators.path, folder / "model.pt2", tmp_path / "example.pt")
    assert result.returncode == 1 and result.stdout == "whole: output 3 differs\n"


def test_the_program_says_that_there_is_no_such_library(folder: Path) -> None:
    result = _run(folder / "build/run", "./none.so", folder / "model.pt2", folder / "example.pt")
    assert result.returncode == 1 and "./none.so: cannot open shared object file" in result.stdout
