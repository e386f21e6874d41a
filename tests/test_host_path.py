"""The CUDA operators' host code without a GPU: what it allocates, plans and launches, run by the emulator."""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import cuda_toolkit
import pytest
import torch
from problems import DTYPES, PROBLEMS, Problem, make
from torch import Tensor

import rwkv_kernels  # noqa: F401 - whose operators have the schemas

gpu_programs = pytest.importorskip("gpu_programs")

ROOT = Path(__file__).parent.parent
NAMESPACE = "rwkv_kernels_on_host"
NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
LAUNCH_FAILURE = 719

_libraries: list[torch.library.Library] = []


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library, whose operators are those of the CUDA backend, registered for CPU tensors in a namespace."""
    toolkit = cuda_toolkit.find_toolkit()
    if toolkit is None:
        pytest.skip("there is no CUDA toolkit, whose headers the host code needs")
    schemas = torch.library.Library(NAMESPACE, "DEF")
    for name in ("wkv_forward", "_wkv_backward", "wkv_step"):
        schema = str(getattr(torch.ops.rwkv_kernels, name).default._schema)
        schemas.define(schema.removeprefix("rwkv_kernels::"))
    _libraries.append(schemas)
    torch_folder = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("host") / "host.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DWKV_NAMESPACE={NAMESPACE}", "-DUSE_CUDA"]
    macros.append('-DWKV_CUDA_ARCHITECTURES="7.5"')
    folders = [f"-I{ROOT / 'csrc'}", f"-isystem{torch_folder / 'include'}", f"-isystem{toolkit.home / 'include'}"]
    sources = ["tests/host_path.cpp", "csrc/wkv_plan.cpp", "csrc/wkv_launch.cpp"]
    command = [os.environ.get("CXX", "c++"), *flags, *macros, *folders, *sources, "-o", str(library)]
    subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], cwd=ROOT, check=True)
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.set_emulator(gpu_programs.compile_emulator().emulate)
    return loaded


def _ops() -> Any:
    return torch.ops.rwkv_kernels_on_host


def _assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def emulator() -> Any:
    return gpu_programs.Emulator(gpu_programs.compile_emulator())


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_programs.name_of)
@pytest.mark.parametrize("name", ["small_with_state", "two_checkpoints_and_one", "transposed", "expanded", "wide"])
def test_forward_and_backward_launch_what_the_plan_says(
    name: str, dtype: torch.dtype, host: ctypes.CDLL, emulator: Any
) -> None:
    x = make(PROBLEMS[name], dtype)
    outputs = _ops().wkv_forward(*x.inputs, True)
    _assert_equal(outputs, gpu_programs.forward(emulator, *x.inputs, True))
    y, state_out, checkpoints = _ops().wkv_forward(*x.inputs, False)
    _assert_equal((y, state_out), outputs[:2])
    assert checkpoints.shape[1] == 0
    for gstate in (x.gstate, None):
        given = (*x.inputs, outputs[2], x.gy, gstate)
        _assert_equal(_ops()._wkv_backward(*given), gpu_programs.backward(emulator, *given))


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=gpu_programs.name_of)
def test_parameters_have_a_dtype_and_strides_of_their_own(
    parameter_dtype: torch.dtype, host: ctypes.CDLL, emulator: Any
) -> None:
    x = make(Problem(T=70), torch.bfloat16)
    w, u = (p.to(parameter_dtype) for p in (x.w, x.u))
    strided_w, strided_u = (torch.stack((p, p + 1), 1)[:, 0] for p in (w, u))
    outputs = _ops().wkv_forward(strided_w, strided_u, x.k, x.v, None, True)
    _assert_equal(outputs, gpu_programs.forward(emulator, w, u, x.k, x.v, None, True))
    gradients = _ops()._wkv_backward(strided_w, strided_u, x.k, x.v, None, outputs[2], x.gy, None)
    assert gradients[0].dtype == gradients[1].dtype == parameter_dtype


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_programs.name_of)
def test_a_step_writes_to_the_state_where_it_lies_and_counts_its_version(
    dtype: torch.dtype, gated: bool, host: ctypes.CDLL
) -> None:
    x = make(Problem(B=3, T=1, with_state=True), dtype)
    k, v = x.k[:, 0], x.v[:, 0]
    assert x.state is not None
    r = torch.randn_like(k) if gated else None
    whole = torch.randn(5, 4, k.shape[1] * 2, dtype=x.state.dtype)
    view = whole[1:4, :3, ::2]
    view.copy_(x.state)
    beside, version = whole.clone(), whole._version
    y = _ops().wkv_step(x.w, x.u, k, v, view, r)
    assert whole._version == version + 1
    state = x.state.clone()
    expected = torch.ops.rwkv_kernels.wkv_step(x.w, x.u, k, v, state, r)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(view, state, rtol=1e-5, atol=1e-5)
    view.copy_(beside[1:4, :3, ::2])
    assert torch.equal(whole, beside), "a step wrote beside its state"


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_a_call_without_steps_hands_the_state_on(
    shape: tuple[int, int, int], with_state: bool, host: ctypes.CDLL
) -> None:
    B, _, C = shape
    k, w = torch.zeros(shape), torch.zeros(C)
    state = torch.randn(B, 3, C) if with_state else None
    if state is not None and C > 0:
        state[:, 1, 0] = 0  # empty, whatever the others say
        state[:, 0, 1] = float("nan")
    given = (w, w, k, k, state)
    _assert_equal(_ops().wkv_forward(*given, True), torch.ops.rwkv_kernels.wkv_forward(*given, True))
    checkpoints = k.new_empty((B, -(-shape[1] // 64), 3, C))
    for gstate in (None, torch.randn(B, 3, C)):
        gradients = (*given, checkpoints, k, gstate)
        _assert_equal(_ops()._wkv_backward(*gradients), torch.ops.rwkv_kernels._wkv_backward(*gradients))


def test_an_expanded_state_is_refused_before_anything_is_written(host: ctypes.CDLL) -> None:
    w, k, row = torch.zeros(4), torch.zeros(2, 4), torch.zeros(1, 3, 4)
    for operators in (_ops(), torch.ops.rwkv_kernels):
        with pytest.raises(RuntimeError, match=r"state: expected elements of their own, got an expanded .*dimension 0"):
            operators.wkv_step(w, w, k, k, row.expand(2, 3, 4), None)
    assert torch.equal(row, torch.zeros(1, 3, 4))


def test_errors_of_the_runtime_say_what_to_do(host: ctypes.CDLL) -> None:
    x = make(Problem(), torch.float32)
    host.set_next_error(NO_KERNEL_IMAGE)
    with pytest.raises(
        RuntimeError, match=r"has compute capability 6\.1, and this build is for 7\.5: rebuild with TOR"
    ):
        _ops().wkv_forward(*x.inputs, True)
    host.set_next_error(LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match="wkv: CUDA error: an error of the runtime"):
        _ops().wkv_forward(*x.inputs, True)
    assert torch.isfinite(_ops().wkv_forward(*x.inputs, True)[0]).all()


def test_a_forced_plan_is_met(host: ctypes.CDLL, emulator: Any) -> None:
    x = make(Problem(B=1, T=700, C=70), torch.float32)
    force = host.rwkv_kernels_force_cuda_plan
    force.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 4]
    try:
        force(b"chunked", 0, 0, 128, 0)
        expected = gpu_programs.forward(emulator, *x.inputs, True, schedule="chunked", chunk_len=128)
        _assert_equal(_ops().wkv_forward(*x.inputs, True), expected)
        force(b"serial", 0, 0, 128, 0)
        with pytest.raises((RuntimeError, ValueError), match="serial"):  # by torch's version
            _ops().wkv_forward(*x.inputs, True)
    finally:
        force(None, 0, 0, 0, 0)
    _assert_equal(_ops().wkv_forward(*x.inputs, True), gpu_programs.forward(emulator, *x.inputs, True))
