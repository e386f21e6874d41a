"""The package that Hugging Face's `kernels` loads: its functions by the oracle, the loader, unpatched transformers."""

import fcntl
import importlib
import importlib.metadata
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import assert_tensor_close, tolerance
from torch import Tensor

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.compat import hub

ROOT = Path(__file__).parent.parent
LAYOUT = ROOT / "build" / "hub"

T, C = 70, 12
DTYPES = {"": torch.float32, "_bf16": torch.bfloat16}


def _inputs(B: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As the kernel is called: w is the log-decay in float32, and u has k's dtype."""
    draw = torch.Generator().manual_seed(B)
    shapes = [C], [C], [B, T, C], [B, T, C], [B, T, C]
    drawn = [torch.randn(shape, generator=draw, device="cpu").to(torch.get_default_device()) for shape in shapes]
    raw, u, (k, v, gy) = *drawn[:2], (x.to(dtype) for x in drawn[2:])
    return {"w": -torch.exp(raw), "u": u.to(dtype), "k": k, "v": v, "gy": gy}


def _exact(x: dict[str, Tensor], state: Tensor | None = None) -> dict[str, Tensor]:
    """The oracle in float64, of the same numbers; state is [B, C, 3]."""
    raw = (-x["w"].double()).log()
    leaves = [y.double().requires_grad_() for y in (raw, x["u"], x["k"], x["v"])]
    y, after = reference.wkv(*leaves, None if state is None else state.double().transpose(1, 2))
    gradients = torch.autograd.grad(y, leaves, x["gy"].double())
    num, den, top = after.detach().unbind(1)
    return {"y": y.detach(), "mean": num / den, "log_den": den.log() + top} | dict(
        zip(("gw", "gu", "gk", "gv"), gradients, strict=True)
    )


def _allowed(dtype: torch.dtype) -> float:
    return tolerance(dtype, T, 10.0)


def _state(B: int, empty: bool) -> Tensor:
    """[B, C, 3], empty as transformers makes one, or any."""
    if empty:
        return torch.tensor([0.0, 0.0, -1e38]).expand(B, C, 3).contiguous()
    draw = torch.Generator().manual_seed(7)
    num, den, top = torch.randn(3, B, C, generator=draw, device="cpu").to(torch.get_default_device())
    return torch.stack((num, den.exp(), top), 2)


def _calls(module: Any, suffix: str, x: dict[str, Tensor], state: Tensor | None = None) -> dict[str, Tensor]:
    """Everything that the kernel's functions write, into tensors as transformers makes them."""
    w, u, k, v = x["w"], x["u"], x["k"], x["v"]
    y = torch.empty_like(k)
    written = {"y": y}
    if state is None:
        getattr(module, f"forward{suffix}")(w, u, k, v, y)
        gradients = {"gw": torch.empty_like(w, dtype=k.dtype), "gu": torch.empty_like(u)}
        gradients |= {"gk": torch.empty_like(k), "gv": torch.empty_like(v)}
        getattr(module, f"backward{suffix}")(w, u, k, v, y, x["gy"], *gradients.values())
        written |= gradients
    else:
        s = state.clone()
        getattr(module, f"forward_with_state{suffix}")(w, u, k, v, y, s)
        written |= {"mean": s[..., 0] / s[..., 1], "log_den": s[..., 1].log() + s[..., 2]}
    return written


def assert_computes(module: ModuleType, suffix: str, B: int, of: str) -> None:
    dtype = DTYPES[suffix]
    x = _inputs(B, dtype)
    state = None if of == "gradients" else _state(B, of == "empty_state")
    exact = _exact(x, state)
    for name, found in _calls(module, suffix, x, state).items():
        output = torch.float32 if name in ("mean", "log_den") else dtype
        assert_tensor_close(name, found, exact[name], _allowed(output))


OF = ["gradients", "empty_state", "state"]


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("B", [1, 2, 3])
@pytest.mark.parametrize("suffix", DTYPES)
def test_what_is_written_is_exact(suffix: str, B: int, of: str, native_backend: str) -> None:
    with rwkv_kernels.use_backend(native_backend):
        assert_computes(hub, suffix, B, of)


def test_a_gradient_of_the_decay_that_vanished_is_zero_and_other_dtypes_are_written() -> None:
    """exp(time_decay) that underflows is no decay at all; u stays float32 under autocast."""
    x = _inputs(2, torch.bfloat16)
    x["w"][:3] = 0.0
    x["u"] = x["u"].float()
    found = _calls(hub, "_bf16", x)
    exact = _exact({name: y.clone() for name, y in x.items()} | {"w": x["w"].clamp(max=-1e-30)})
    assert not found["gw"][:3].any() and found["gu"].dtype == torch.float32
    for name in ("y", "gu", "gk", "gv"):
        assert_tensor_close(name, found[name], exact[name], _allowed(torch.bfloat16))


def test_functions_are_known_by_their_names() -> None:
    for name in set(hub.__all__) - {"max_seq_length"}:
        function = getattr(hub, name)
        assert function.__name__ == function.__qualname__ == name
        assert pickle.loads(pickle.dumps(function)) is function


def test_any_layout_is_read_and_written() -> None:
    x = _inputs(3, torch.float32)
    expected = _calls(hub, "", x) | _calls(hub, "", x, _state(3, False))
    for name in ("k", "v", "gy"):
        x[name] = x[name].transpose(0, 1).contiguous().transpose(0, 1)
    state = _state(3, False).transpose(1, 2).contiguous().transpose(1, 2)
    for name, found in (_calls(hub, "", x) | _calls(hub, "", x, state)).items():
        assert found.equal(expected[name]), name


def _refusals() -> dict[str, tuple[type[Exception], str, str, dict[str, Any]]]:
    f32, bf16 = torch.float32, torch.bfloat16
    k, gw = torch.zeros(2, 5, 4), torch.zeros(2, 4)
    return {
        "bfloat16": (TypeError, "forward", "_bf16", {"k": k.to(bf16), "v": k.to(bf16), "y": k.to(bf16)}),
        "float32 in _bf16": (TypeError, "forward_bf16", "expected torch.bfloat16, got torch.float32", {}),
        "y": (ValueError, "forward", r"y: expected shape \[2, 5, 4\]", {"y": torch.zeros(2, 4, 4)}),
        "y's dtype": (TypeError, "forward", "y: expected torch.float32", {"y": k.to(torch.float16)}),
        "the operator's state": (ValueError, "forward_with_state", r"\[2, 4, 3\]", {"s": torch.zeros(2, 3, 4)}),
        "a row of gw for each sequence": (ValueError, "backward", r"gw: expected shape \[4\]", {"gw": gw}),
        "gradient": (ValueError, "forward", "no gradient", {"k": k.clone().requires_grad_()}),
        "second derivative": (ValueError, "backward", "gy: .* no second", {"gy": k.clone().requires_grad_()}),
        "another device": (ValueError, "forward", "device cpu", {"y": torch.empty(2, 5, 4, device="meta", dtype=f32)}),
    }


@pytest.mark.parametrize("case", _refusals())
def test_what_is_refused_leaves_everything_as_it_was(case: str) -> None:
    error, function, message, changes = _refusals()[case]
    c, btc = torch.ones(4), torch.zeros(2, 5, 4)
    names = {"forward": "w u k v y", "forward_with_state": "w u k v y s", "backward": "w u k v y gy gw gu gk gv"}
    shapes = dict.fromkeys(("w", "u", "gw", "gu"), c) | {"s": torch.zeros(2, 4, 3)}
    arguments = {
        name: shapes.get(name, btc).clone() for name in names[function.removesuffix("_bf16")].split()
    } | changes
    before = {name: x.detach().clone() for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        getattr(hub, function)(*arguments.values())
    assert all(x.device.type == "meta" or x.equal(before[name]) for name, x in arguments.items())


# ---- laid out, and loaded by `kernels` ----


@pytest.fixture(scope="module")
def layout() -> Path:
    """build/hub, laid out if it is missing or made from other files."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    pytest.importorskip("tomllib", reason="tools/hub.py needs Python 3.11")
    pytest.importorskip("setuptools", minversion="77")
    LAYOUT.mkdir(parents=True, exist_ok=True)
    with (LAYOUT / "lock").open("w") as lock:  # one at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = [sys.executable, str(ROOT / "tools" / "hub.py")]
        made = subprocess.run(program, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return LAYOUT


@pytest.fixture(scope="module")
def kernel(layout: Path) -> ModuleType:
    import kernels

    return kernels.get_local_kernel(layout, backend=None if torch.cuda.is_available() else "cpu")  # type: ignore[no-any-return]


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("suffix", DTYPES)
def test_what_kernels_loads_is_exact(suffix: str, B: int, of: str, kernel: ModuleType) -> None:
    assert_computes(kernel, suffix, B, of)


def test_the_copy_and_the_package_live_in_one_process(kernel: ModuleType) -> None:
    name = kernel.__name__
    assert re.fullmatch(r"_rwkv4_(cpu|cuda)_[0-9a-f]{8}", name)
    assert kernel.build_info().library != rwkv_kernels.build_info().library
    assert kernel.wkv.__module__ == f"{name}.rwkv_kernels.functional"
    x = _inputs(2, torch.float32)
    arguments = x["w"], x["u"], x["k"], x["v"]
    own, copied = getattr(torch.ops, name).wkv_forward, torch.ops.rwkv_kernels.wkv_forward
    assert own.default is not copied.default
    for found, expected in zip(own(*arguments, None, True), copied(*arguments, None, True), strict=True):
        assert found.equal(expected)
    assert kernel.wkv(*arguments).equal(rwkv_kernels.wkv(*arguments))
    assert set(hub.__all__) | set(rwkv_kernels.__all__) == set(kernel.__all__)


INCLUDED = (".h", ".def")


def test_kernel_builder_gets_every_source() -> None:
    """kernel-builder sees the files that build.toml names, and no others."""
    tomllib = pytest.importorskip("tomllib", reason="this Python is older than 3.11")
    configuration = tomllib.loads((ROOT / "hub" / "build.toml").read_text())
    shared, of_cuda = configuration["torch"]["src"], configuration["kernel"]["wkv_cuda"]["src"]
    for folder, others, named in (("cpu", {"csrc/ops.cpp"}, shared), ("cuda", set(), of_cuda)):
        named = [path for path in named if path.startswith("csrc/") and not path.endswith(INCLUDED)]
        in_folder = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob("*.c*")}
        assert set(named) == in_folder | others and len(named) == len(set(named))
    headers = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in INCLUDED}
    listed = [path for path in shared + of_cuda if path.endswith(INCLUDED)]
    assert set(listed) == headers and len(listed) == len(headers)
    capabilities = configuration["kernel"]["wkv_cuda"]["cuda-capabilities"]
    assert f'"{",".join(capabilities)}"' in (ROOT / "hub" / "namespace.h").read_text()


def test_the_library_is_found_where_kernel_builder_puts_it(layout: Path, kernel: ModuleType, tmp_path: Path) -> None:
    """Beside the package, by the name of the namespace; in a new process, because the namespace is in use here."""
    variant = Path(str(kernel.__file__)).parent
    copied = shutil.copytree(variant, tmp_path / "kernel")
    (copied / "rwkv_kernels" / "librwkv_kernels.so").rename(copied / f"{kernel.__name__}.abi3.so")
    program = [sys.executable, "-c", "import kernel; print(kernel.build_info().library)"]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == str(copied / f"{kernel.__name__}.abi3.so"), result.stderr


@pytest.mark.parametrize("how", ["LOCAL_KERNELS", "get_local_kernel"])
def test_unpatched_transformers_computes_with_it_what_its_loop_does(how: str, layout: Path, kernel: ModuleType) -> None:
    """In a new process: transformers keeps its kernel in a global variable, and reads the environment once."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    arguments, environment = [str(layout)], dict(os.environ)
    if how == "LOCAL_KERNELS":
        wanted, installed = _kernels_of(transformers), importlib.metadata.version("kernels")
        if not wanted.contains(installed):
            pytest.skip(f"transformers {transformers.__version__} takes kernels{wanted}, and {installed} is installed")
        arguments, environment["LOCAL_KERNELS"] = [], f"kernels-community/rwkv={layout}"
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    program = [sys.executable, str(ROOT / "tests" / "hub_in_transformers.py"), *arguments]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{kernel.__name__}: equal to the loop\n"


def _kernels_of(transformers: ModuleType) -> Any:
    """The versions of `kernels` that this transformers accepts."""
    from packaging.requirements import Requirement

    table = importlib.import_module("transformers.dependency_versions_table").deps
    return Requirement(table["kernels"]).specifier
