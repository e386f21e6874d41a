"""The GPU kernels without a GPU: what the host would launch, the same plan and the same arguments, run on the CPU.

Two executors run a launch. `Emulator` runs the kernels' C++ phases, compiled by the host compiler; `PtxRunner` runs the
PTX that nvcc makes of the kernels, by the program that RWKV_KERNELS_PTX_RUNNER names.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from problems import checkpoint_interval, state_dtype
from torch import Tensor

from rwkv_kernels import _introspection

ROOT = Path(__file__).parent.parent
KERNELS = (
    "summarise_states",
    "carry_states",
    "forward",
    "forward_single_pass",
    "summarise_adjoints",
    "carry_adjoints",
    "backward",
    "backward_single_pass",
    "reduce",
    "clear",
    "step",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
GUARD = 64  # elements before and behind every output, which nothing may touch

Launch = dict[str, Any]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Memory:
    """The tensors of a call: outputs begin as NaN, between guards, and everything is known by its address."""

    def __init__(self) -> None:
        self.arrays: list[numpy.ndarray[Any, Any]] = []
        self._guarded: list[Tensor] = []
        self._kept: list[Tensor] = []

    def given(self, tensor: Tensor) -> int:
        """The address of an input, whose whole storage may be read."""
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.arrays.append(storage.numpy())
        self._kept.append(tensor)
        return tensor.data_ptr()

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        guarded = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype)
        guarded[:GUARD] = guarded[size + GUARD :] = 1.0
        self._guarded.append(guarded)
        inner = guarded[GUARD : size + GUARD]
        self.arrays.append(inner.view(torch.uint8).numpy())
        return inner.view(shape)

    def assert_guards_hold(self) -> None:
        for guarded in self._guarded:
            assert (guarded[:GUARD] == 1).all() and (guarded[-GUARD:] == 1).all(), "an output was overrun"


class Executor(Protocol):
    def run(self, launch: Launch, memory: Memory) -> None: ...


def compile_emulator() -> ctypes.CDLL:
    """Half a minute, so once for all processes that test the same sources: by their content, in build/emulator."""
    source = ROOT / "tests" / "emulator.cpp"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", str(source)]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(repr(command).encode() + version)
    for path in [source, *sorted((ROOT / "csrc").rglob("*.h"))]:
        content.update(path.read_bytes())
    library = ROOT / "build" / "emulator" / f"{content.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return ctypes.CDLL(str(library))


@dataclass
class Emulator:
    """Threads in order, reversed or shuffled; without the barrier behind one phase of a kernel, if that is given."""

    library: ctypes.CDLL
    order: str = "forward"
    seed: int = 0
    dropped_barrier: tuple[str, int] | None = None

    def run(self, launch: Launch, memory: Memory) -> None:
        dropped = self.dropped_barrier
        self.library.emulate(
            KERNELS.index(launch["kernel"]),
            DTYPES.index(launch["dtype"]),
            (ctypes.c_uint * 3)(*launch["grid"]),
            launch["block"][0],
            launch["shared_bytes"],
            launch["arguments"],
            ("forward", "reversed", "shuffled").index(self.order),
            ctypes.c_uint64(self.seed),
            dropped[1] if dropped is not None and dropped[0] == launch["kernel"] else -1,
        )


def load_ptx_runner() -> Any:
    """The module that RWKV_KERNELS_PTX_RUNNER names."""
    specification = importlib.util.spec_from_file_location("run_ptx", os.environ["RWKV_KERNELS_PTX_RUNNER"])
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def symbol(kernel: str, dtype: str) -> str:
    """Enough of the kernel's mangled name to know it by."""
    element = {"float32": "f", "float16": "NS_4HalfE", "bfloat16": "NS_8Bfloat16E", "float64": "d"}[dtype]
    real = "d" if dtype == "float64" else "f"
    passes = {"summarise": 0, "replay": 1, "single": 2}

    def walk(program: str, name: str) -> str:
        return f"{len(program)}{program}I{element}LNS_4PassE{passes[name]}E"

    return {
        "summarise_states": walk("Forward", "summarise"),
        "carry_states": f"11CarryStatesI{real}E",
        "forward": walk("Forward", "replay"),
        "forward_single_pass": walk("Forward", "single"),
        "summarise_adjoints": walk("Backward", "summarise"),
        "carry_adjoints": f"13CarryAdjointsI{real}E",
        "backward": walk("Backward", "replay"),
        "backward_single_pass": walk("Backward", "single"),
        "reduce": f"6ReduceI{real}E",
        "clear": "5ClearE",
        "step": f"4StepI{element}E",
    }[kernel]


# Compiled for this processor, which takes longer than to run: by the PTX, the kernel, and whether it counts.
_translated: dict[tuple[Path, str, bool], Any] = {}


class PtxRunner:
    """The PTX for one architecture; `order` is that in which blocks start and threads are switched.

    With `counted`, that gathers how often all threads together executed each operation of a kernel.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str,
        order: str = "fwd",
        seed: int = 0,
        counted: dict[str, Counter[str]] | None = None,
    ) -> None:
        self.order = order
        self.seed = seed
        self._counted = counted
        self._runner = load_ptx_runner()
        self._ptx = folder / f"{architecture}.ptx"
        if not self._ptx.exists():
            source = ROOT / "csrc" / "cuda" / "wkv_kernels.cu"
            flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}", "-ptx"]
            subprocess.run(["nvcc", *flags, str(source), "-o", str(self._ptx)], check=True)

    def run(self, launch: Launch, memory: Memory) -> None:
        name = symbol(launch["kernel"], launch["dtype"])
        key = (self._ptx, name, self._counted is not None)
        if key not in _translated:
            _translated[key] = self._runner.Module(self._ptx.read_text(), only=name, profile=key[2])
        statistics = _translated[key].run(
            name,
            [launch["arguments"]],
            grid=launch["grid"],
            block=launch["block"],
            shared=launch["shared_bytes"],
            extra=memory.arrays,
            order=self.order,
            seed=self.seed,
        )
        if self._counted is not None:
            self._counted.setdefault(launch["kernel"], Counter()).update(statistics["ops"])


# ---- the host path, as the operators take it, but for the device ----


def _sequence(memory: Memory, name: str, tensor: Tensor) -> dict[str, int]:
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    address = memory.given(tensor)
    return {name: address, f"{name}_batch_stride": tensor.stride(0), f"{name}_time_stride": tensor.stride(1)}


def _token(memory: Memory, name: str, tensor: Tensor | None) -> dict[str, int]:
    if tensor is None:
        return {f"{name}_stride": 0}
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return {name: memory.given(tensor), f"{name}_stride": tensor.stride(0)}


def _parameters(memory: Memory, w: Tensor, u: Tensor) -> dict[str, Any]:
    return {"w": memory.given(w), "u": memory.given(u), "w_dtype": name_of(w.dtype), "u_dtype": name_of(u.dtype)}


def _run(executor: Executor, memory: Memory, operation: str, k: Tensor, arguments: dict[str, Any], plan: Any) -> None:
    B, C = k.shape[0], k.shape[-1]
    T = k.shape[1] if k.dim() == 3 else 1
    dtype = name_of(k.dtype)
    if operation != "step":
        size = _introspection.plan_cuda(operation, dtype, B, T, C, **plan)["workspace_bytes"]
        arguments["workspace"] = memory.output((size // 4,), torch.float32).data_ptr()
    for launch in _introspection.cuda_launches(operation, dtype, B, T, C, arguments, **plan):
        executor.run(launch, memory)
    memory.assert_guards_hold()


def _state(memory: Memory, name: str, state: Tensor | None) -> dict[str, int]:
    return {} if state is None else {name: memory.given(state.contiguous())}


def forward(
    executor: Executor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, checkpoint: bool, **plan: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the checkpoints."""
    B, T, C = k.shape
    memory = Memory()
    interval = checkpoint_interval(k.dtype)
    y = memory.output((B, T, C), k.dtype)
    state_out = memory.output((B, 3, C), state_dtype(k.dtype))
    checkpoints = memory.output((B, -(-T // interval) if checkpoint else 0, 3, C), state_dtype(k.dtype))
    arguments = {
        **_parameters(memory, w, u),
        **_sequence(memory, "k", k),
        **_sequence(memory, "v", v),
        **_state(memory, "state", state),
        "y": y.data_ptr(),
        "state_out": state_out.data_ptr(),
    }
    if checkpoint:
        arguments["checkpoints"] = checkpoints.data_ptr()
    _run(executor, memory, "forward", k, arguments, plan)
    return y, state_out, checkpoints


def backward(
    executor: Executor,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor,
    gstate_out: Tensor | None,
    **plan: Any,
) -> tuple[Tensor, ...]:
    """gw, gu, gk, gv and gstate."""
    B, T, C = k.shape
    memory = Memory()
    results = {
        "gw": memory.output((C,), w.dtype),
        "gu": memory.output((C,), u.dtype),
        "gk": memory.output((B, T, C), k.dtype),
        "gv": memory.output((B, T, C), k.dtype),
        "gstate": memory.output((B, 3, C), state_dtype(k.dtype)),
    }
    arguments = {
        **_parameters(memory, w, u),
        **_sequence(memory, "k", k),
        **_sequence(memory, "v", v),
        **_sequence(memory, "gy", gy),
        **_state(memory, "state", state),
        **_state(memory, "checkpoints", checkpoints),
        **_state(memory, "gstate_out", gstate_out),
        **{name: tensor.data_ptr() for name, tensor in results.items()},
    }
    _run(executor, memory, "backward", k, arguments, plan)
    return tuple(results.values())


def step(
    executor: Executor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None = None
) -> Tensor:
    """y, or with r sigmoid(r) * y; the state moves on in place."""
    memory = Memory()
    y = memory.output(tuple(k.shape), k.dtype)
    strides = dict(zip(("batch", "row", "channel"), state.stride(), strict=True))
    arguments = {
        **_parameters(memory, w, u),
        **_token(memory, "k", k),
        **_token(memory, "v", v),
        **_token(memory, "r", r),
        "y": y.data_ptr(),
        "state": memory.given(state),
        **{f"state_{name}_stride": stride for name, stride in strides.items()},
    }
    _run(executor, memory, "step", k, arguments, {})
    return y
