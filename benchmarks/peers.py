"""The operator against other implementations: fla and transformers where installed, and files of the user.

Such a file is Python with a differentiable function `wkv(w, u, k, v)` -> y in this package's conventions: w [C] the raw
decay, u [C], k and v [B, T, C]. It may compile and load anything. Around the `RUN_CUDA` of BlinkDL's
RWKV-LM it is one line, `return RUN_CUDA(*k.shape, w, u, k, v)`, below its import.
"""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import rwkv_kernels
from benchmarks.device import Device, backends, timed
from benchmarks.op import TENSORS
from benchmarks.problem import Function, Problem, Shape, function_of, name_of, written
from benchmarks.records import Record, Row

TITLE = "Peers, each through autograd; errors are against float64, relative to the largest element"

SHAPES: dict[str, list[Shape]] = {
    "cuda": [(8, 1024, 768), (1, 1024, 768), (32, 1024, 2048), (1, 4096, 768), (8, 4096, 4096), (1, 16384, 768)],
    "cpu": [(4, 512, 768), (1, 1024, 768)],
    "smoke": [(2, 16, 32)],
}
DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,), "smoke": (torch.float32, torch.bfloat16)}
LONGEST_LOOP = 1024  # steps; a dozen launches each
PATIENCE = 5.0  # seconds for the runs of the slowest


def _fla() -> Function:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = rwkv_kernels.empty_state(k.shape[0], k.shape[2], device=k.device).to(k.dtype)  # it requires k's dtype
        return fused_recurrent_rwkv4(w, u, k, v, state.unsqueeze(2))[0]  # type: ignore[no-any-return]

    return wkv


def _transformers_kernel() -> Function:
    from transformers.models.rwkv import modeling_rwkv

    modeling_rwkv.load_wkv_cuda_kernel(1024)  # its longest sequence, even for models of longer contexts

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
    """The available peers, by name and version; prints the reason for each that is missing."""
    transformers = f"transformers {_version('transformers')}"
    loaders: dict[str, Callable[[], Function]] = {f"{transformers}, loop": _transformers_loop}
    if device.is_gpu:
        fla = f"fla {_version('flash-linear-attention')}"
        loaders |= {fla: _fla, f"{transformers}, kernel": _transformers_kernel}
    loaders |= {name: lambda path=path: _from_file(path) for name, path in files.items()}
    peers = {}
    for name, loader in loaders.items():
        # A peer whose import or build fails is left out, for any exception.
        try:
            peers[name] = loader()
        except Exception as error:
            print(f"peer {name}: not here ({type(error).__name__}: {error})", flush=True)
    return peers


def run(device: Device, record: Record, files: dict[str, Path]) -> None:
    """A row for every shape, dtype, operation and implementation, ours first."""
    ours = {f"rwkv_kernels, {backend}": function_of(backend) for backend in backends(device)}
    others = load(device, files)
    rows: list[Row] = []
    for shape in SHAPES[device.scale]:
        for dtype in DTYPES[device.scale]:
            with record.attempt(f"{shape} {dtype}"):
                with device.default():
                    problem = Problem(shape, dtype)
                errors = {who: problem.check(function) for who, function in ours.items()}
                errors |= _errors_of_others(problem, others, f"{shape}, {dtype}")
                where = {"shape": written(shape), "dtype": name_of(dtype)}
                rows += _rows(device, problem, where, {**ours, **others}, errors)
                record.add(TITLE, ["shape", "dtype", "operation", "who"], rows)


def _errors_of_others(problem: Problem, others: dict[str, Function], where: str) -> dict[str, float]:
    """The errors of the peers that solve the problem; a peer may refuse it, or be wrong."""
    errors = {}
    for who, function in others.items():
        try:
            errors[who] = problem.error(function)
        except Exception as refusal:
            print(f"peer {who} at {where}: {type(refusal).__name__}: {refusal}", flush=True)
    return errors


def _rows(
    device: Device, problem: Problem, where: Row, functions: dict[str, Function], errors: dict[str, float]
) -> Iterator[Row]:
    calls = {
        "forward": {who: lambda f=functions[who]: problem.forward(f) for who in errors},
        "backward": {who: problem.prepare_backward(functions[who]) for who in errors},
    }
    for operation in TENSORS:
        seconds = device.patiently(calls[operation], PATIENCE)
        ours = statistics.median(next(iter(seconds.values())))
        for who, samples in seconds.items():
            times = {**timed(samples), "of our time": statistics.median(samples) / ours}
            yield {**where, "operation": operation, "who": who, **times, "error": errors[who]}
