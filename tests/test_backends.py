"""The choice of the backend: its precedence, and the errors when one cannot run."""

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import Problem, make
from processes import PACKAGE, run_python

import rwkv_kernels
from rwkv_kernels import native
from rwkv_kernels._backends import cuda as cuda_backend
from rwkv_kernels._backends import registry
from rwkv_kernels.native import Library

CALL = """
import torch, rwkv_kernels
x = torch.zeros(1, 2, 3)
try:
    rwkv_kernels.wkv(torch.zeros(3), torch.zeros(3), x, x)
except rwkv_kernels.BackendUnavailable as error:
    print(error)
rwkv_kernels.wkv(torch.zeros(3), torch.zeros(3), x, x, backend="reference")
"""

CHOICE = """
import torch
from rwkv_kernels._backends import registry
print(registry.select("auto", torch.zeros(1, 1, 1)).name)
"""


def test_every_backend_is_listed_with_its_reason() -> None:
    listed = rwkv_kernels.backends()
    assert [info.name for info in listed] == ["cuda", "triton", "cpu", "reference"]
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
    with pytest.raises(ValueError, match="'tpu' is unknown. Known: auto, cuda, triton, cpu, reference"):
        rwkv_kernels.use_backend("tpu").__enter__()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_variable_chooses(name: str) -> None:
    assert run_python(CHOICE, RWKV_KERNELS_BACKEND=name).strip() == name


def test_an_unknown_name_in_the_environment_is_refused_by_the_call() -> None:
    code = CALL.replace("rwkv_kernels.BackendUnavailable", "ValueError")
    assert "'tpu' is unknown" in run_python(code, RWKV_KERNELS_BACKEND="tpu")


def test_a_refusal_says_what_was_asked_why_not_and_what_can() -> None:
    reasons = {info.name: info.reason for info in rwkv_kernels.backends()}
    cuda = f"cuda: {reasons['cuda'] or 'k is on xpu:0, and this backend takes tensors on cuda'}"
    triton = f"triton: {reasons['triton'] or 'k is on xpu:0, and this backend takes tensors on cuda'}"
    cpu = "cpu: k is on xpu:0, and this backend takes tensors on cpu or meta"
    for name, reason in (("auto", f"{cuda}; {triton}; {cpu}"), ("cuda", cuda), ("triton", triton), ("cpu", cpu)):
        with pytest.raises(rwkv_kernels.BackendUnavailable) as error:
            registry.select(name, _on("xpu:0"))
        assert str(error.value) == f"wkv backend '{name}' refused ({reason}). Available for this call: reference."


def test_the_cuda_backend_refuses_tensors_on_the_cpu_and_names_who_takes_them() -> None:
    reason = next(info.reason for info in rwkv_kernels.backends() if info.name == "cuda")
    reason = reason or "k is on cpu, and this backend takes tensors on cuda"
    x = torch.zeros(1, 2, 3)
    with pytest.raises(rwkv_kernels.BackendUnavailable) as error:
        rwkv_kernels.wkv(x[0, 0], x[0, 0], x, x, backend="cuda")
    assert str(error.value) == f"wkv backend 'cuda' refused (cuda: {reason}). Available for this call: cpu, reference."


def _on(device: str) -> Any:
    """A stand-in for k on a device that need not exist, with all that the choice reads."""
    return SimpleNamespace(device=torch.device(device), dtype=torch.float32)


NOT_BUILT = Library(None, "not built")


def _cuda(*architectures: str) -> Library:
    """CUDA kernels of a build for these architectures."""
    return Library(Path("library"), None, {"cuda": "13.0", "cuda_architectures": architectures})


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces the CUDA kernels, the only GPU and Triton's reason to be unavailable."""
    remembered = (cuda_backend.why_unavailable, cuda_backend.why_uncovered)

    def forget() -> None:
        for answer in remembered:
            answer.cache_clear()  # type: ignore[attr-defined]

    def replace(cuda: Library, capability: tuple[int, int] | None = None, triton: str | None = "no Triton") -> None:
        forget()
        backend = dataclasses.replace(registry.BACKENDS["triton"], why_unavailable=lambda: triton)
        monkeypatch.setitem(registry.BACKENDS, "triton", backend)
        monkeypatch.setattr(native, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    yield replace
    forget()


@pytest.mark.parametrize(
    ("cuda", "capability", "reason"),
    [
        (NOT_BUILT, None, "not built"),
        (_cuda("9.0"), None, f"torch for CUDA {torch.version.cuda} finds no usable GPU"),
        (_cuda("9.0"), (9, 0), "None"),
    ],
)
def test_the_cuda_backend_names_the_first_thing_that_is_missing(
    cuda: Library, capability: tuple[int, int] | None, reason: str, pretend: Callable[..., None]
) -> None:
    pretend(cuda, capability)
    assert str(cuda_backend.why_unavailable()).startswith(reason)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (("9.0",), (9, 0), True),
        (("8.0",), (8, 6), True),
        (("8.6",), (8, 0), False),
        (("8.0", "9.0"), (10, 0), False),
        (("8.0+PTX",), (12, 0), True),
        (("8.6+PTX",), (8, 0), False),
        (("7.5", "12.0+PTX"), (9, 0), False),
        ((), (9, 0), False),
    ],
)
def test_a_gpu_that_the_build_does_not_cover_is_refused_with_what_to_do(
    built: tuple[str, ...], capability: tuple[int, int], runs: bool, pretend: Callable[..., None]
) -> None:
    pretend(_cuda(*built), capability)
    k = _on("cuda:0")
    if runs:
        assert registry.select("auto", k).name == registry.select("cuda", k).name == "cuda"
        return
    number = "{}.{}".format(*capability)
    reason = f"cuda:0 has compute capability {number}, and this build is for {', '.join(built)}: rebuild with"
    for name in ("auto", "cuda"):
        with pytest.raises(rwkv_kernels.BackendUnavailable) as error:
            registry.select(name, k)
        assert f"cuda: {reason} TORCH_CUDA_ARCH_LIST={number}" in str(error.value)
        assert str(error.value).endswith("Available for this call: reference.")


def test_auto_on_a_gpu_takes_cuda_then_triton_and_else_lists_the_reasons(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    k = _on("cuda:0")
    pretend(_cuda("9.0"), (9, 0), triton=None)
    assert registry.select("auto", k).name == "cuda"
    for cuda in (NOT_BUILT, _cuda("8.0")):
        pretend(cuda, (9, 0), triton=None)
        assert registry.select("auto", k).name == "triton"
    pretend(NOT_BUILT, (9, 0))
    monkeypatch.setattr(native, "operators", NOT_BUILT)
    with pytest.raises(rwkv_kernels.BackendUnavailable) as error:
        registry.select("auto", k)
    assert "refused (cuda: not built; triton: no Triton; cpu: not built). Available for this" in str(error.value)


def test_the_device_is_queried_once(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    queried: list[int] = []
    pretend(_cuda("9.0"), (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: queried.append(index) or (9, 0))
    for _ in range(3):
        registry.select("auto", _on("cuda:0"))
        registry.select("cuda", _on("cuda:1"))
    assert queried == [0, 1]


def test_torch_compile_takes_what_a_device_said_for_a_constant() -> None:
    @registry.constant
    def why_not(index: int | None) -> str | None:
        torch._dynamo.graph_break()  # as looking for a GPU would
        return None if index is None else "not the CPU"

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if why_not(x.device.index) is None else x - 1

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_neither_import_nor_a_call_on_the_cpu_looks_for_a_gpu() -> None:
    code = """
import torch
def fail(*arguments): raise AssertionError("somebody looked for a GPU")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = torch.cuda._lazy_init = fail
import rwkv_kernels
from rwkv_kernels import native
from rwkv_kernels._backends import registry
native.cuda = native.Library(native.operators.path, None, {"cuda": "13.0", "cuda_architectures": ("9.0",)})
x = torch.zeros(1, 2, 3)
print(registry.select("auto", x).name)
"""
    assert run_python(code).strip() == "cpu"


def test_import_is_quick_and_compiles_nothing() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import rwkv_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"rwkv_kernels"} - set(sys.stdlib_module_names)))
"""
    assert run_python(code).strip() == "[]"


def test_the_doctor_finds_this_machine_healthy() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rwkv_kernels"], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name, available, _ in rwkv_kernels.backends():
        assert f"{name:12}{'available: off the float64 oracle by' if available else 'not available'}" in result.stdout


def test_build_info_names_the_build() -> None:
    info = rwkv_kernels.build_info()
    assert (info.library is None) == (info.why_missing is not None)
    assert (info.cuda_library is None) == (info.why_cuda_missing is not None)
    assert (info.cuda_library is None) == (info.cuda is None) == (info.cuda_architectures == ())
    if info.library is None:
        pytest.skip(info.why_missing or "")
    assert Path(info.library).parent == PACKAGE and info.torch is not None and info.compiler is not None
    assert info.cpu_instruction_set in info.cpu_instruction_sets


def test_a_call_uses_the_backend_that_was_chosen() -> None:
    tensors = make(Problem(T=4))
    w, u, k, v, _ = tensors.inputs
    with rwkv_kernels.use_backend("reference"):
        y = rwkv_kernels.wkv(w, u, k, v.requires_grad_())
        assert isinstance(y, torch.Tensor) and "StackBackward" in str(y.grad_fn)


def test_triton_says_what_it_lacks_and_is_not_imported_for_that() -> None:
    code = "import sys, rwkv_kernels; print(rwkv_kernels.backends()[1].reason); print('triton' in sys.modules)"
    reason, imported = run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0").splitlines()
    assert "Triton is not installed: pip install triton" in reason or "finds no usable GPU" in reason
    assert imported == "False"


def test_auto_is_never_the_interpreter_of_triton() -> None:
    assert run_python(CHOICE, TRITON_INTERPRET="1").strip() == "cpu"


def test_triton_refuses_the_cpu_and_float64_and_names_who_takes_them() -> None:
    code = """
import torch, rwkv_kernels
import dataclasses
from rwkv_kernels._backends.registry import BACKENDS
BACKENDS["triton"] = dataclasses.replace(BACKENDS["triton"], why_unavailable=lambda: None)
x = torch.zeros(1, 2, 3, dtype=torch.float64)
try:
    rwkv_kernels.wkv(x[0, 0], x[0, 0], x, x, backend="triton")
except rwkv_kernels.BackendUnavailable as error:
    print(error)
"""
    refused = "wkv backend 'triton' refused (triton: k is"
    can = "Available for this call: cpu, reference."
    compiled, interpreted = (run_python(code, TRITON_INTERPRET=value).strip() for value in "01")
    assert compiled == f"{refused} on cpu, and this backend takes tensors on cuda). {can}"
    assert interpreted == f"{refused} torch.float64, and this backend takes float32, float16 or bfloat16). {can}"


def test_a_new_backend_is_a_module_and_its_registration() -> None:
    """The list, both functions, the doctor, and the fixtures of the operators' tests."""
    code = """
import torch, toy_backend, rwkv_kernels
from rwkv_kernels import __main__
assert rwkv_kernels.backends()[-1] == ("toy", True, None)
x, state = torch.zeros(1, 2, 3), rwkv_kernels.empty_state(1, 3)
for backend in ("toy", "cpu"):
    y = rwkv_kernels.wkv(x[0, 0], x[0, 0], x, x + 1, backend=backend)
    yt = rwkv_kernels.wkv_step(x[0, 0], x[0, 0], x[:, 0], x[:, 0] + 1, state, backend=backend)
    assert torch.equal(y[:, 0], yt) and torch.equal(yt, torch.ones(1, 3)), backend
try:
    rwkv_kernels.wkv(x[0, 0], x[0, 0], x[:, :0], x[:, :0], backend="toy")
except rwkv_kernels.BackendUnavailable as error:
    assert "'toy' refused (toy: k has no steps)" in str(error)
raise SystemExit(__main__.main())
"""
    here = Path(__file__).parent
    assert "\n  toy         available: off the float64 oracle by" in run_python(code, PYTHONPATH=str(here))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "toy_backend", "-p", "no:cacheprovider"]
    files = ["test_operator.py", "test_mixing.py"]
    result = subprocess.run(
        [*command, *files, "-k", "toy and (small or another_dtype or packed_many_tiny)"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and "backend toy: " in result.stdout, result.stdout[-3000:]
