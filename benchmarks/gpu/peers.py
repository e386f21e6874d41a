"""The operator against what people run today: fla and transformers where installed, and others from files of the user.

Such a file is Python with a differentiable function `wkv(w, u, k, v)` -> y in this package's conventions: w [C] the raw
decay, u [C], k and v [B, T, C]. It may compile or load what it likes: how a peer is built is the peer's affair. Around
the `RUN_CUDA` of BlinkDL's RWKV-LM it is one line, `return RUN_CUDA(*k.shape, w, u, k, v)`, below its import.
"""

import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import rwkv_kernels
from benchmarks import harness
from benchmarks.gpu.operations import TENSORS, backends, function_of
from benchmarks.gpu.problem import Function, Problem, Shape
from benchmarks.gpu.timing import Device

TITLE = "Peers, each through autograd; errors are against float64, relative to the largest element"

SHAPES: list[Shape] = [
    (8, 1024, 768),
    (1, 1024, 768),
    (32, 1024, 2048),
    (1, 4096, 768),
    (8, 4096, 4096),
    (1, 16384, 768),
]
SMOKE_SHAPES: list[Shape] = [(2, 16, 32)]
LONGEST_LOOP = 1024  # steps; a dozen launches each
SLOW = 0.05  # seconds of a call that is not worth many runs


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


def load(device: Device, files: dict[str, Path]) -> dict[str, Function]:
    """The peers that are there; why another is not is printed."""
    loaders: dict[str, Callable[[], Function]] = {"transformers, loop": _transformers_loop}
    if device.is_gpu:
        loaders |= {"fla": _fla, "transformers, kernel": _transformers_kernel}
    loaders |= {name: lambda path=path: _from_file(path) for name, path in files.items()}
    peers = {}
    for name, loader in loaders.items():
        # Whatever a peer's import or build raises is that peer's affair.
        try:
            peers[name] = loader()
        except Exception as error:
            print(f"peer {name}: not here ({type(error).__name__}: {error})", flush=True)
    return peers


def run(device: Device, files: dict[str, Path]) -> list[harness.Row]:
    peers = load(device, files)
    rows: list[harness.Row] = []
    for shape in SHAPES if device.is_gpu else SMOKE_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(shape, dtype)
            for backend in backends(device):
                peers_and_us = {**{f"rwkv_kernels, {backend}": function_of(backend, None)}, **peers}
                rows += _rows(device, shape, dtype, problem, peers_and_us)
    return rows


def _rows(
    device: Device, shape: Shape, dtype: torch.dtype, problem: Problem, functions: dict[str, Function]
) -> list[harness.Row]:
    rows: list[harness.Row] = []
    ours: dict[str, float] = {}
    for who, function in functions.items():
        try:
            error = problem.error(function)
            calls = {"forward": lambda f=function: problem.forward(f), "backward": problem.prepare_backward(function)}
            for operation in TENSORS:
                samples = _seconds(device, calls[operation])
                median = statistics.median(samples)
                ours.setdefault(operation, median)
                rows.append(
                    {
                        "shape": ", ".join(map(str, shape)),
                        "dtype": str(dtype).removeprefix("torch."),
                        "operation": operation,
                        "who": who,
                        "ms": median * 1e3,
                        "of our time": median / ours[operation],
                        "error": error,
                        "_seconds": samples,
                    }
                )
        except Exception as refusal:
            if not ours:
                raise
            print(f"peer {who} at {shape}, {dtype}: {type(refusal).__name__}: {refusal}", flush=True)
    return rows


def _seconds(device: Device, call: Callable[[], object]) -> list[float]:
    first = device.alternate({"call": call}, runs=1)["call"]
    return first if first[0] > SLOW else device.alternate({"call": call})["call"]
