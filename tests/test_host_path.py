"""The GPU operators' host code without a GPU: its handling of a call's tensors, and its errors."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_toolkit
import gpu_host
import pytest
import torch
from problems import PROBLEMS, Problem, Tensors, make
from torch import Tensor

from rwkv_kernels.inputs import DTYPES

ROOT = Path(__file__).parent.parent
NAMESPACE_OF_CUDA = "rwkv_kernels_of_cuda"
INVALID_DEVICE_FUNCTION, NO_KERNEL_IMAGE, LAUNCH_FAILURE = 98, 209, 719  # of cudaError_t


@pytest.fixture
def ops() -> Iterator[Any]:
    with gpu_host.raw_operators(gpu_host.Emulator()) as operators:
        yield operators
    assert gpu_host.library().overruns() == 0, "an output was overrun"


def _assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _every_second(x: Tensor) -> Tensor:
    """The same numbers in a view with gaps."""
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


def _differently_laid_out(tensors: Tensors) -> list[Tensors]:
    return [
        tensors.changed(_every_second),
        tensors.changed(lambda x: x.mT.contiguous().mT if x.dim() == 3 else x),
        tensors.changed(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x),
        # Rows of another length than C, and of an odd address.
        tensors.changed(lambda x: torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2]),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("C", [19, 128])  # rows that vectors cannot move, and rows that they can
def test_tensors_of_any_strides_give_the_same_bits(C: int, dtype: torch.dtype, ops: Any) -> None:
    x = make(Problem(B=3, T=300, C=C, with_state=True), dtype)
    outputs = ops.wkv_forward(*x.inputs, True)
    gradients = ops._wkv_backward(*x.inputs, outputs[2], x.gy, x.gstate)
    for strided in _differently_laid_out(x):
        assert not strided.k.is_contiguous() and not strided.gy.is_contiguous()
        _assert_equal(ops.wkv_forward(*strided.inputs, True), outputs)
        checkpoints = _every_second(outputs[2])
        _assert_equal(ops._wkv_backward(*strided.inputs, checkpoints, strided.gy, strided.gstate), gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("name", ["transposed", "time_major", "expanded", "every_second_channel"])
def test_expanded_and_transposed_sequences_equal_their_copies(name: str, dtype: torch.dtype, ops: Any) -> None:
    x = make(PROBLEMS[name], dtype)
    copied = x.changed(Tensor.contiguous)
    assert x.k.stride() != copied.k.stride()
    outputs = ops.wkv_forward(*copied.inputs, True)
    _assert_equal(ops.wkv_forward(*x.inputs, True), outputs)
    gy = x.gy[:1, :1].expand(x.gy.shape)
    given = (outputs[2], gy, None)
    _assert_equal(ops._wkv_backward(*x.inputs, *given), ops._wkv_backward(*copied.inputs, outputs[2], gy.clone(), None))


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
def test_checkpoints_are_made_where_they_are_wanted(dtype: torch.dtype, ops: Any) -> None:
    x = make(Problem(T=300), dtype)
    outputs = ops.wkv_forward(*x.inputs, True)
    y, state_out, checkpoints = ops.wkv_forward(*x.inputs, False)
    _assert_equal((y, state_out), outputs[:2])
    assert checkpoints.shape[1] == 0
    assert outputs[2].shape[1] == -(-300 // (128 if dtype == torch.float64 else 64)) and outputs[2].isfinite().all()
    gradients = ops._wkv_backward(*x.inputs, outputs[2], x.gy, None)
    _assert_equal(gradients, ops._wkv_backward(*x.inputs, outputs[2], x.gy, torch.zeros_like(x.gstate)))


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=gpu_host.name_of)
def test_parameters_have_a_dtype_and_strides_of_their_own(parameter_dtype: torch.dtype, ops: Any) -> None:
    x = make(Problem(T=70), torch.bfloat16)
    w, u = x.w.to(parameter_dtype), x.u.to(torch.float16)
    for operators in (ops, torch.ops.rwkv_kernels):
        outputs = operators.wkv_forward(w, u, x.k, x.v, None, True)
        gradients = operators._wkv_backward(w, u, x.k, x.v, None, outputs[2], x.gy, None)
        assert (gradients[0].dtype, gradients[1].dtype) == (parameter_dtype, torch.float16)
        strided = (_every_second(w), _every_second(u), x.k, x.v, None)
        _assert_equal(operators.wkv_forward(*strided, True), outputs)
        _assert_equal(operators._wkv_backward(*strided, outputs[2], x.gy, None), gradients)
        wide = operators._wkv_backward(w.float(), u.float(), x.k, x.v, None, outputs[2], x.gy, None)
        torch.testing.assert_close(gradients[0].float(), wide[0], rtol=2**-7, atol=0)
        torch.testing.assert_close(gradients[1].float(), wide[1], rtol=2**-10, atol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
def test_a_step_writes_to_the_state_where_it_lies_and_counts_its_version(
    dtype: torch.dtype, gated: bool, ops: Any
) -> None:
    x = make(Problem(B=3, T=1, with_state=True), dtype)
    k, v = x.k[:, 0], x.v[:, 0]
    assert x.state is not None
    r = torch.randn_like(k) if gated else None
    whole = torch.randn(5, 4, k.shape[1] * 2, dtype=x.state.dtype)
    view = whole[1:4, :3, ::2]
    view.copy_(x.state)
    beside, version = whole.clone(), whole._version
    y = ops.wkv_step(x.w, x.u, k, v, view, r)
    assert whole._version == version + 1
    state = x.state.clone()
    expected = torch.ops.rwkv_kernels.wkv_step(x.w, x.u, k, v, state, r)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(view, state, rtol=1e-5, atol=1e-5)
    view.copy_(beside[1:4, :3, ::2])
    assert torch.equal(whole, beside), "a step wrote beside its state"
    strided = [None if token is None else _every_second(token) for token in (k, v, r)]
    again = x.state.clone()
    assert torch.equal(ops.wkv_step(_every_second(x.w), _every_second(x.u), *strided[:2], again, strided[2]), y)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_a_call_without_steps_hands_the_state_on(shape: tuple[int, int, int], with_state: bool, ops: Any) -> None:
    B, _, C = shape
    k, w = torch.zeros(shape), torch.zeros(C)
    state = torch.randn(B, 3, C) if with_state else None
    if state is not None and C > 0:
        state[:, 1, 0] = 0  # empty, for any num and max
        state[:, 0, 1] = float("nan")
    given = (w, w, k, k, state)
    _assert_equal(ops.wkv_forward(*given, True), torch.ops.rwkv_kernels.wkv_forward(*given, True))
    checkpoints = k.new_empty((B, -(-shape[1] // 64), 3, C))
    for gstate in (None, torch.randn(B, 3, C)):
        gradients = (*given, checkpoints, k, gstate)
        _assert_equal(ops._wkv_backward(*gradients), torch.ops.rwkv_kernels._wkv_backward(*gradients))
    state = torch.randn(B, 3, C)
    before = state.clone()
    if 0 in (B, C):
        assert ops.wkv_step(w, w, k[:, 0], k[:, 0], state, None).shape == (B, C) and torch.equal(state, before)


def test_an_expanded_state_is_refused_before_anything_is_written(ops: Any) -> None:
    w, k, row = torch.zeros(4), torch.zeros(2, 4), torch.zeros(1, 3, 4)
    for operators in (ops, torch.ops.rwkv_kernels):
        with pytest.raises(RuntimeError, match=r"state: expected elements of their own, got an expanded .*dimension 0"):
            operators.wkv_step(w, w, k, k, row.expand(2, 3, 4), None)
    assert torch.equal(row, torch.zeros(1, 3, 4))


def test_more_than_32_bits_can_count_is_refused(ops: Any) -> None:
    w, k = torch.zeros(1), torch.zeros(1, 1, 1).expand(2**31, 1, 1)
    with pytest.raises(RuntimeError, match=r"wkv: B: expected at most 2147479551 on a GPU, got 2147483648"):
        ops.wkv_forward(w, w, k, k, None, False)
    with pytest.raises(RuntimeError, match=r"wkv: T: expected at most 2147479551 on a GPU, got 2147483648"):
        ops.wkv_forward(w, w, k.transpose(0, 1), k.transpose(0, 1), None, False)
    k = torch.zeros(1, 1, 1).expand(2**20, 2**18, 1)
    with pytest.raises(
        RuntimeError, match=r"wkv: B \* T and B \* C: expected at most 137438953472 on a GPU, got 2748779"
    ):
        ops.wkv_forward(w, w, k, k, None, False)
    none = torch.zeros(0)
    y, state, _ = ops.wkv_forward(none, none, *2 * [torch.zeros(2**20, 2**20, 0)], None, False)
    assert y.shape == (2**20, 2**20, 0) and state.shape == (2**20, 3, 0)


# ---- errors of the runtime ----


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The CUDA operators for CPU tensors, whose launches return the given errors."""
    toolkit = cuda_toolkit.find_toolkit()
    if toolkit is None:
        pytest.skip("there is no CUDA toolkit, whose headers the launcher needs")
    schemas = torch.library.Library(NAMESPACE_OF_CUDA, "DEF")
    for name in gpu_host.OPERATORS:
        schema = str(getattr(torch.ops.rwkv_kernels, name).default._schema)
        schemas.define(schema.removeprefix("rwkv_kernels::"))
    torch_folder = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("cuda") / "cuda.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DWKV_NAMESPACE={NAMESPACE_OF_CUDA}", "-DUSE_CUDA"]
    macros.append('-DWKV_CUDA_ARCHITECTURES="7.5"')
    folders = [f"-I{ROOT / 'csrc'}", f"-isystem{torch_folder / 'include'}", f"-isystem{toolkit.home / 'include'}"]
    command = [os.environ.get("CXX", "c++"), *flags, *macros, *folders, "tests/cuda_op.cpp", "-o", str(library)]
    subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], cwd=ROOT, check=True)
    torch.ops.load_library(str(library))
    yield ctypes.CDLL(str(library))
    del schemas  # until here the operators exist


NO_CODE = (
    r"wkv: cuda:-?\d+ has compute capability 6\.1, and this build is for 7\.5: rebuild with TORCH_CUDA_ARCH_LIST=6\.1"
)


@pytest.mark.parametrize(
    ("of_launch", "of_memset", "message"),
    [
        (NO_KERNEL_IMAGE, 0, NO_CODE),
        (INVALID_DEVICE_FUNCTION, 0, NO_CODE),
        (LAUNCH_FAILURE, 0, "wkv: CUDA error: an error of the runtime"),
        (0, LAUNCH_FAILURE, "wkv: CUDA error: an error of the runtime"),
    ],
)
def test_errors_of_the_runtime_say_what_to_do_and_are_cleared(
    of_launch: int, of_memset: int, message: str, cuda: ctypes.CDLL
) -> None:
    x = make(Problem(T=300), torch.float32)  # of several chunks, whose messages are set to nothing first
    operators = getattr(torch.ops, NAMESPACE_OF_CUDA)
    cuda.set_errors(of_launch, of_memset)
    cleared = cuda.count_of_cleared_errors()
    with pytest.raises(RuntimeError, match=message):
        operators.wkv_forward(*x.inputs, True)
    assert cuda.count_of_cleared_errors() == cleared + 1, "a later call would report the error again"
    cuda.set_errors(0, 0)
    assert operators.wkv_forward(*x.inputs, True)[0].shape == x.k.shape
