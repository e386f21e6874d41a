"""Fixtures that every test may use, and the closing line that says which backends ran."""

import collections
import pathlib
from typing import Any, NamedTuple

import pytest
import torch
from problems import dtypes_of
from torch._ops import OpOverload

import rwkv_kernels
from rwkv_kernels._backends.registry import BACKENDS
from rwkv_kernels._backends.triton import op

if op.INTERPRETED:
    import triton_interpreter

    triton_interpreter.repair()

_calls_by_backend: collections.Counter[str] = collections.Counter()


NAMES = [info.name for info in rwkv_kernels.backends()]
GPU_NAMES = [name for name in NAMES if BACKENDS[name].device_type == "cuda"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=NAMES,
        help="fail, instead of skip, the tests of this backend where it is not available (repeatable)",
    )


def _start(name: str, request: pytest.FixtureRequest) -> str:
    """The name of an available backend, whose device becomes torch's default; skips or fails without it."""
    info = next(info for info in rwkv_kernels.backends() if info.name == name)
    if not info.available:
        stop = pytest.fail if name in request.config.getoption("--require-backend") else pytest.skip
        stop(f"backend {name}: {info.reason}")
    dtype = request.node.callspec.params.get("dtype")
    if dtype is not None and dtype not in dtypes_of(name):
        pytest.skip(f"backend {name} does not compute in {dtype}")
    _calls_by_backend[name] += 1
    if name in GPU_NAMES:
        torch.set_default_device(BACKENDS[name].device_type)
        request.addfinalizer(lambda: torch.set_default_device(None))
    return name


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that this machine lacks is a skip with its reason."""
    return _start(request.param, request)


@pytest.fixture(params=[name for name in NAMES if name != "reference"])
def compiled_backend(request: pytest.FixtureRequest) -> str:
    """Every backend but the oracle in plain torch."""
    return _start(request.param, request)


@pytest.fixture(params=[name for name in NAMES if BACKENDS[name].bi_forward is not None])
def bi_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that has the bidirectional operator."""
    return _start(request.param, request)


@pytest.fixture(params=[name for name in NAMES if BACKENDS[name].bi_forward is not None and name != "reference"])
def compiled_bi_backend(request: pytest.FixtureRequest) -> str:
    """Those of them but the oracle in plain torch."""
    return _start(request.param, request)


@pytest.fixture(params=[name for name in NAMES if name in ("cpu", "cuda")])
def native_backend(request: pytest.FixtureRequest) -> str:
    """Every backend behind the operators of torch.ops.rwkv_kernels."""
    return _start(request.param, request)


class Operators(NamedTuple):
    """A backend's operators of torch.ops.rwkv_kernels."""

    backend: str
    forward: OpOverload
    backward: OpOverload
    step: OpOverload


@pytest.fixture(params=[name for name in NAMES if isinstance(BACKENDS[name].step, OpOverload)])
def operators(request: pytest.FixtureRequest) -> Operators:
    """The operators of every backend that has some."""
    backend = _start(request.param, request)
    prefix = BACKENDS[backend].step._schema.name.split("::")[1].removesuffix("_step")
    names = (f"{prefix}_forward", f"_{prefix}_backward", f"{prefix}_step")
    return Operators(backend, *(getattr(torch.ops.rwkv_kernels, name).default for name in names))


@pytest.fixture(params=GPU_NAMES)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on a GPU."""
    return _start(request.param, request)


@pytest.fixture(params=["triton"])
def triton(request: pytest.FixtureRequest) -> str:
    """The backend "triton", on a GPU or interpreted."""
    return _start(request.param, request)


@pytest.fixture
def single_process(tmp_path: pathlib.Path) -> collections.abc.Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def poisoned_memory() -> collections.abc.Iterator[None]:
    """New tensors start as NaN, so that an unwritten element is detected."""
    # Only the filling is needed: cuBLAS and others may stay nondeterministic. torch.use_deterministic_algorithms would
    # also import Inductor, which takes 3 seconds a process.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode("default")


# Several processes (pytest -n) count together: each worker sends its counts to the one that prints the closing lines.


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["calls_by_backend"] = dict(_calls_by_backend)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _calls_by_backend.update(getattr(node, "workeroutput", {}).get("calls_by_backend", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, available, reason in rwkv_kernels.backends():
        ran = f"{_calls_by_backend[name]} tests" if available else f"not available: {reason}"
        terminalreporter.write_line(f"backend {name}: {ran}")
    build = rwkv_kernels.build_info()
    terminalreporter.write_line(f"cpu kernels: {build.cpu_instruction_set} of {', '.join(build.cpu_instruction_sets)}")
