"""Which backend runs, who may say so, and what is said when one cannot."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from problems import Problem, make

import rwkv_kernels
from rwkv_kernels import registry

PACKAGE = Path(rwkv_kernels.__file__).parent


def _run(code: str, package_root: Path = PACKAGE.parent, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(package_root), **environment},
        cwd=package_root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _copy_without_extension(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "rwkv_kernels", ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"))
    return tmp_path


CALL = """
import torch, rwkv_kernels
x = torch.zeros(1, 2, 3)
try:
    rwkv_kernels.wkv(torch.zeros(3), torch.zeros(3), x, x)
except rwkv_kernels.BackendUnavailable as error:
    print(error)
rwkv_kernels.wkv(torch.zeros(3), torch.zeros(3), x, x, backend="reference")
"""


def test_every_backend_is_listed_with_its_reason() -> None:
    listed = rwkv_kernels.backends()
    assert [info.name for info in listed] == ["cpu", "reference"]
    for name, available, reason in listed:
        assert available == (reason is None), name


def test_use_backend_changes_what_auto_means_and_nests() -> None:
    k = torch.zeros(1, 1, 1)
    assert registry.select("auto", k).name == "cpu"
    with rwkv_kernels.use_backend("reference"):
        assert registry.select("auto", k).name == "reference"
        with rwkv_kernels.use_backend("auto"):
            assert registry.select("auto", k).name == "cpu"
        assert registry.select("cpu", k).name == "cpu"
        assert registry.select("auto", k).name == "reference"
    assert registry.select("auto", k).name == "cpu"


def test_use_backend_is_undone_by_an_exception_and_unknown_to_other_threads() -> None:
    k = torch.zeros(1, 1, 1)
    seen: list[str] = []

    def fail_inside() -> None:
        with rwkv_kernels.use_backend("reference"):
            thread = threading.Thread(target=lambda: seen.append(registry.select("auto", k).name))
            thread.start()
            thread.join()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert seen == ["cpu"] and registry.select("auto", k).name == "cpu"


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'tpu' is unknown. Known: auto, cpu, reference"):
        rwkv_kernels.use_backend("tpu").__enter__()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_variable_chooses(name: str) -> None:
    code = "import torch; from rwkv_kernels import registry; print(registry.select('auto', torch.zeros(1, 1, 1)).name)"
    assert _run(code, RWKV_KERNELS_BACKEND=name).strip() == name


def test_an_unknown_name_in_the_environment_is_refused_by_the_call() -> None:
    code = CALL.replace("rwkv_kernels.BackendUnavailable", "ValueError")
    assert "'tpu' is unknown" in _run(code, RWKV_KERNELS_BACKEND="tpu")


def test_a_refusal_says_what_was_asked_why_not_and_what_can() -> None:
    class Elsewhere:
        device = torch.device("cuda:0")
        dtype = torch.float32

    for name in ("auto", "cpu"):
        message = (
            f"wkv backend '{name}' refused (cpu: k is on cuda:0, and this backend runs on the CPU). "
            "Available for this call: reference."
        )
        with pytest.raises(rwkv_kernels.BackendUnavailable) as error:
            registry.select(name, Elsewhere())  # type: ignore[arg-type]
        assert str(error.value) == message


def test_without_the_extension_the_package_imports_and_says_what_to_do(tmp_path: Path) -> None:
    output = _run(CALL, _copy_without_extension(tmp_path))
    assert "wkv backend 'auto' refused (cpu: the extension is not built for this Python: run `pip install" in output
    assert "Available for this call: reference." in output


def test_an_extension_of_another_torch_is_not_loaded(tmp_path: Path) -> None:
    root = _copy_without_extension(tmp_path)
    (root / "rwkv_kernels" / "_built_for.txt").write_text("1.0.0\n")
    assert "the extension was built for torch 1.0.0, and this is torch 2." in _run(CALL, root)


def test_a_broken_extension_is_told_and_not_fatal(tmp_path: Path) -> None:
    root = _copy_without_extension(tmp_path)
    suffix = next(PACKAGE.glob("_C.*.so"), None)
    if suffix is None:
        pytest.skip("the extension is not built")
    (root / "rwkv_kernels" / suffix.name).write_bytes(b"not a library")
    assert "the extension does not load (" in _run(CALL, root)


def test_import_is_quick_and_compiles_nothing() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import rwkv_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"rwkv_kernels"} - set(sys.stdlib_module_names)))
"""
    assert _run(code).strip() == "[]"


def test_the_doctor_finds_this_machine_healthy() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rwkv_kernels"], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name, available, _ in rwkv_kernels.backends():
        assert f"{name:12}{'available: off the float64 oracle by' if available else 'not available'}" in result.stdout


def test_build_info_names_the_build() -> None:
    info = rwkv_kernels.build_info()
    if info.extension is None:
        assert info.why_missing
        pytest.skip(info.why_missing or "")
    assert info.torch is not None and torch.__version__.startswith(info.torch)
    assert info.cpu_instruction_set in info.cpu_instruction_sets and info.openmp


def test_a_call_uses_the_backend_that_was_chosen() -> None:
    tensors = make(Problem(T=4))
    w, u, k, v, _ = tensors.inputs
    with rwkv_kernels.use_backend("reference"):
        y = rwkv_kernels.wkv(w, u, k, v.requires_grad_())
        assert isinstance(y, torch.Tensor) and "StackBackward" in str(y.grad_fn)
