"""The GPU's operators without a GPU: their host path on CPU tensors, and their kernels on the CPU.

gpu_host.cpp is the launcher that takes a GPU's place; the checks, allocations, plans and launches are those of the
operators. Two executors run a launch: `Emulator` the kernels' phases, compiled by the host compiler; `PtxRunner` the
PTX that nvcc makes of the kernels, by tools/ptx.
"""

import ctypes
import functools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from compiled import compiled
from torch import Tensor

import rwkv_kernels  # noqa: F401 - whose operators have the schemas

ROOT = Path(__file__).parent.parent
NAMESPACE = "rwkv_kernels_on_host"
DTYPES = ("float32", "float16", "bfloat16", "float64")
OPERATORS = ("wkv_forward", "_wkv_backward", "wkv_mixing_forward", "_wkv_mixing_backward", "wkv_step")
OPERATORS += ("_wkv_summary", "_wkv_adjoint_summary")
BI_OPERATORS = ("bi_wkv_forward", "_bi_wkv_backward")

Limits = dict[str, int]  # as _introspection.plan_cuda takes them
H100 = {"multiprocessors": 132, "shared_per_block": 232448, "shared_per_multiprocessor": 233472, "architecture": 900}
T4 = {"multiprocessors": 40, "shared_per_block": 65536, "shared_per_multiprocessor": 65536, "architecture": 750}
# A few columns suffice for it: chunks have several tiles.
ONE_MULTIPROCESSOR = {**H100, "multiprocessors": 1}

_Runner = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def library() -> ctypes.CDLL:
    """The launcher, with its operators."""
    source = ROOT / "tests" / "gpu_host.cpp"
    compiler = os.environ.get("CXX", "c++")
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DWKV_NAMESPACE={NAMESPACE}"]
    folders = [f"-I{ROOT / 'csrc'}", f"-isystem{torch_folder / 'include'}"]
    command = [compiler, *flags, *macros, *folders, str(source), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    library_path = compiled("gpu_host", command, source, torch.__version__)
    global _schemas
    _schemas = torch.library.Library(NAMESPACE, "DEF")
    for name in (*OPERATORS, *BI_OPERATORS):
        schema = str(getattr(torch.ops.rwkv_kernels, name).default._schema)
        _schemas.define(schema.removeprefix("rwkv_kernels::"))
    torch.ops.load_library(str(library_path))
    loaded = ctypes.CDLL(str(library_path))
    loaded.set_limits.argtypes = [ctypes.c_int64] * 4
    loaded.set_emulation.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int]
    loaded.allocation.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    loaded.allocation.restype = ctypes.c_void_p
    loaded.allocation_count.restype = loaded.overruns.restype = ctypes.c_int64
    return loaded


_schemas: torch.library.Library


class Executor(Protocol):
    @property
    def limits(self) -> Limits: ...
    def prepare(self, given: tuple[Any, ...]) -> None: ...
    def finish(self) -> None: ...


@dataclass
class Emulator:
    """Runs the phases with threads in order, reversed or shuffled, and blocks too unless `block_order` differs.

    `dropped_barrier` is a kernel and the number of a barrier, counted from 0 in a block, that is left out in the blocks
    that start last of their columns.
    """

    order: str = "forward"
    seed: int = 0
    dropped_barrier: tuple[str, int] | None = None
    limits: Limits = field(default_factory=lambda: H100)
    block_order: str | None = None

    def prepare(self, given: tuple[Any, ...]) -> None:
        kernel, barrier = self.dropped_barrier or (None, -1)
        self._kernel = kernel.encode() if kernel else None  # must outlive the setting
        orders = [
            ("forward", "reversed", "shuffled").index(order) for order in (self.order, self.block_order or self.order)
        ]
        library().set_runner(None)
        library().set_emulation(*orders, self.seed, self._kernel, barrier)

    def finish(self) -> None:
        pass


def symbol(kernel: str, dtype: str) -> str:
    """The part of the kernel's mangled name that identifies it."""
    element = {"float32": "f", "float16": "NS_4HalfE", "bfloat16": "NS_8Bfloat16E", "float64": "d"}[dtype]
    if kernel == "reduce":
        element = "d" if dtype == "float64" else "f"
    if kernel == "bi_join":
        element = "f"
    name = kernel.title().replace("_", "")
    return f"{len(name)}{name}I{element}E"


@functools.cache
def _ptx_of(architecture: str) -> Path:
    source = ROOT / "csrc" / "cuda" / "kernels.cu"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}", "-ptx"]
    return compiled("kernels_ptx", ["nvcc", *flags, str(source)], source)


# Kernels compiled for this processor, which takes longer than to run them, by PTX and kernel. All count, so that each
# is compiled once.
_kernels: dict[tuple[Path, str], Any] = {}


class PtxRunner:
    """Runs the PTX for one architecture, with the `order`, `seed` and `resident` blocks of ptx.Kernel.run.

    `counted`, if given, collects how often all threads together executed each operation of a kernel.
    """

    def __init__(
        self,
        architecture: str,
        order: str = "forward",
        seed: int = 0,
        counted: dict[str, Counter[str]] | None = None,
        limits: Limits = H100,
        resident: int = 0,
    ) -> None:
        self.order = order
        self.seed = seed
        self.limits = limits
        self.resident = resident
        self._counted = counted
        self._ptx = _ptx_of(architecture)
        self._callback = _Runner(self._run)
        self._given: list[numpy.ndarray[Any, Any]] = []
        self._error: BaseException | None = None

    def prepare(self, given: tuple[Any, ...]) -> None:
        self._given = [
            torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy() for x in given if isinstance(x, Tensor)
        ]
        self._error = None
        library().set_runner(self._callback)

    def finish(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(
        self, kernel: bytes, dtype: bytes, grid: Any, threads: int, shared_bytes: int, params: int, params_bytes: int
    ) -> int:
        try:
            name = symbol(kernel.decode(), dtype.decode())
            key = (self._ptx, name)
            if key not in _kernels:
                import ptx  # in tools, which is on pytest's path only after its plugins are imported

                _kernels[key] = ptx.Kernel(self._ptx.read_text(), name, counted=True)
            executed = _kernels[key].run(
                [ctypes.string_at(params, params_bytes)],
                grid=tuple(grid[:3]),
                threads=threads,
                shared_bytes=shared_bytes,
                memory=[*self._given, *_allocated()],
                order=self.order,
                seed=self.seed,
                resident=self.resident,
            )
            if self._counted is not None:
                self._counted.setdefault(kernel.decode(), Counter()).update(executed)
        except BaseException as error:  # raised again by the caller of the operator: it cannot pass through C
            self._error = error
            return 1
        return 0


def _allocated() -> Iterator[numpy.ndarray[Any, Any]]:
    """The memory that the operator has allocated."""
    size = ctypes.c_int64()
    for i in range(library().allocation_count()):
        address = library().allocation(i, ctypes.byref(size))
        yield numpy.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(address))


def call(executor: Executor, operator: str, *arguments: Any) -> Any:
    """The operator's result, run by the executor on CPU tensors."""
    library().forget_allocations()
    library().set_limits(*executor.limits.values())
    executor.prepare(arguments)
    try:
        result = getattr(getattr(torch.ops, NAMESPACE), operator)(*arguments)
    except RuntimeError:
        executor.finish()
        raise
    assert library().overruns() == 0, "an output was overrun"
    return result


def forward(executor: Executor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the checkpoints: of the plain operator for five inputs, of the mixing one for seven."""
    name = "wkv_forward" if len(arguments) == 6 else "wkv_mixing_forward"
    return call(executor, name, *_contiguous(arguments))  # type: ignore[no-any-return]


def backward(executor: Executor, *arguments: Any) -> tuple[Tensor, ...]:
    """gw, gu, gk, gv and gstate, and of the mixing operator gr."""
    name = "_wkv_backward" if len(arguments) == 8 else "_wkv_mixing_backward"
    return call(executor, name, *_contiguous(arguments))  # type: ignore[no-any-return]


def summary(executor: Executor, *arguments: Any) -> Tensor:
    """The state that the steps leave behind an empty one."""
    return call(executor, "_wkv_summary", *_contiguous(arguments))  # type: ignore[no-any-return]


def adjoint_summary(executor: Executor, *arguments: Any) -> Tensor:
    """The adjoint before the steps where the one after them is zero."""
    return call(executor, "_wkv_adjoint_summary", *_contiguous(arguments))  # type: ignore[no-any-return]


def bi_forward(executor: Executor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y and the checkpoints of the bidirectional operator."""
    return call(executor, "bi_wkv_forward", *_contiguous(arguments))  # type: ignore[no-any-return]


def bi_backward(executor: Executor, *arguments: Any) -> tuple[Tensor, ...]:
    """g_log_decay, gu, gk, gv and gr."""
    return call(executor, "_bi_wkv_backward", *_contiguous(arguments))  # type: ignore[no-any-return]


def step(executor: Executor, *arguments: Any) -> Tensor:
    """y, or with r sigmoid(r) * y; the state moves on in place."""
    *others, state, r = (*arguments, None)[:6]
    return call(executor, "wkv_step", *_contiguous(tuple(others)), state, *_contiguous((r,)))  # type: ignore[no-any-return]


def _contiguous(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors as the operators would copy them: an executor that checks accesses allows only the given ones."""
    return tuple(
        x.contiguous() if isinstance(x, Tensor) and (x.dim() != 3 or x.stride(-1) != 1) else x for x in arguments
    )


@contextmanager
def raw_operators(executor: Executor) -> Iterator[Any]:
    """The operators as torch.ops has them, run by the executor."""
    library().forget_allocations()
    library().set_limits(*executor.limits.values())
    executor.prepare(())
    yield getattr(torch.ops, NAMESPACE)
