"""The operator against what people run today: fla and transformers where installed, and others from files of the user.

Such a file is Python with a differentiable function `wkv(w, u, k, v)` -> y in this package's conventions: w [C] the raw
decay, u [C], k and v [B, T, C]. It may compile or load what it likes: how a peer is built is the peer's affair. Around
the `RUN_CUDA` of BlinkDL's RWKV-LM it is one line, `return RUN_CUDA(*k.shape, w, u, k, v)`, below its import.
"""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import rwkv_kernels
from benchmarks.device import Device, timed
from benchmarks.op import TENSORS, backends, function_of, name_of, written
from benchmarks.problem import Function, Problem, Shape
from benchmarks.records import Record, Row

TITLE = "Peers, each through autograd; errors are against float64, relative to the largest element"

SHAPES: dict[str, list[Shape]] = {
    "cuda": [(8, 1024, 768), (1, 1024, 768), (32, 1024, 2048), (1, 4096, 768), (8, 4096, 4096), (1, 16384, 768)],
    "cpu": [(4, 512, 768), (1, 1024, 768)],
    "smoke": [(2, 16, 32)],
}
DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,), "smoke": (torch.float32, torch.bfloat16)}
LONGEST_LOOP = 1024  # steps; a dozen launches each
PATIENCE = 5.0  # seconds for the runs of one call


def _fla() -> Function:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = rwkv_kernels.empty_state(k.shape[0], k.shape[2]).to(k.dtype)  # it keeps states in k's dtype
        return fused_recurrent_rwkv4(w, u, k, v, state.unsqueeze(2))[0]  # type: ignore[no-any-return]

    return wkv


def _transformers_kernel() -> Function:
    from transformers.models.rwkv import modeling_rwkv

    modeling_rwkv.load_wkv_cuda_kernel(1024)  # the longest that it is built for, whatever a longer context asks

    def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[0] > 1:
            raise ValueError("its backward writes gw and gu beyond their end for more than one sequence")
        return modeling_rwkv.RwkvLinearAttention.apply(w, u, k, v)[0]  # type: ignore[no-any-return]

    return wkv


def _transformers_loop() -> Function:
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] > LONGEST_LOOP:
            raise ValueError(f"a loop over {k.shape[1]} steps is not waited for")
        return rwkv_linear_attention_cpu(w, u, k, v)[0]  # type: ignore[no-any-return]

    return wkv


def _from_file(path: Path) -> Function:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.wkv  # type: ignore[no-any-return]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load(device: Device, files: dict[str, Path]) -> dict[str, Function]:
    """The peers that are there, by name and version; why another is not is printed."""
    transformers = f"transformers {_version('transformers')}"
    loaders: dict[str, Callable[[], Function]] = {f"{transformers}, loop": _transformers_loop}
    if device.is_gpu:
        fla = f"fla {_version('flash-linear-attention')}"
        loaders |= {fla: _fla, f"{transformers}, kernel": _transformers_kernel}
    loaders |= {name: lambda path=path: _from_file(path) for name, path in files.items()}
    peers = {}
    for name, loader in loaders.items():
        # Whatever a peer's import or build raises is that peer's affair.
        try:
            peers[name] = loader()
        except Exception as error:
            print(f"peer {name}: not here ({type(error).__name__}: {error})", flush=True)
    return peers


def run(device: Device, record: Record, files: dict[str, Path]) -> None:
    """A row for every shape, dtype, operation and implementation, ours first."""
    ours = {f"rwkv_kernels, {backend}": function_of(backend, None) for backend in backends(device)}
    functions = {**ours, **load(device, files)}
    rows: list[Row] = []
    for shape in SHAPES[device.scale]:
        for dtype in DTYPES[device.scale]:
            with record.attempt(f"{shape} {dtype}"):
                rows += _rows(device, shape, dtype, functions)
    record.add(TITLE, ["shape", "dtype", "operation", "who"], rows)


def _rows(device: Device, shape: Shape, dtype: torch.dtype, functions: dict[str, Function]) -> list[Row]:
    problem = Problem(shape, dtype)
    rows: list[Row] = []
    ours: dict[str, float] = {}
    for who, function in functions.items():
        try:
            error = problem.error(function)
            calls = {"forward": lambda f=function: problem.forward(f), "backward": problem.prepare_backward(function)}
            for operation in TENSORS:
                samples = device.seconds(calls[operation], PATIENCE)
                median = statistics.median(samples)
                ours.setdefault(operation, median)
                rows.append(
                    {
                        "shape": written(shape),
                        "dtype": name_of(dtype),
                        "operation": operation,
                        "who": who,
                        **timed(samples),
                        "of our time": median / ours[operation],
                        "error": error,
                    }
                )
        except Exception as refusal:
            if not ours:
                raise
            print(f"peer {who} at {shape}, {dtype}: {type(refusal).__name__}: {refusal}", flush=True)
    return rows
