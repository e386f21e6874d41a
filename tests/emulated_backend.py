"""A backend "emulated" for tests: the GPU kernels by one of the executors of gpu_programs, on CPU tensors.

As a pytest plugin (-p emulated_backend) it lets the whole suite run on them: on the C++ phases, or with
WKV_TEST_ARCHITECTURE=sm_90 on the PTX of that architecture. WKV_TEST_PLANS may ask something of the plans, as JSON.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_programs
import pytest
import torch
from problems import checkpoint_interval
from torch import Tensor

from rwkv_kernels import autograd, registry

NAME = "emulated"


class _Current:
    executor: gpu_programs.Executor
    forward_plan: dict[str, Any]
    backward_plan: dict[str, Any]


_library = torch.library.Library("rwkv_kernels_emulated", "FRAGMENT")
_library.define(
    "forward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, bool checkpoint) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor checkpoints, Tensor gy, "
    "Tensor? gstate_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*arguments: Any) -> Any:
    if 0 in arguments[2].shape:  # no operator asks its kernels for that
        return torch.ops.rwkv_kernels.wkv_forward(*arguments)
    return gpu_programs.forward(_Current.executor, *arguments, **_Current.forward_plan)


def _backward(*arguments: Any) -> Any:
    if 0 in arguments[2].shape:
        return torch.ops.rwkv_kernels._wkv_backward(*arguments)
    return gpu_programs.backward(_Current.executor, *arguments, **_Current.backward_plan)


def _step(*arguments: Any) -> Tensor:
    return gpu_programs.step(_Current.executor, *arguments)


_library.impl("forward", _forward, "CPU")
_library.impl("backward", _backward, "CPU")
_ops = torch.ops.rwkv_kernels_emulated
_differentiable = autograd.attach(
    _library,
    _ops.forward.default,
    _ops.backward.default,
    checkpoint_interval,
)
_backend = registry.Backend(NAME, ("cpu",), lambda: None, lambda k: None, _differentiable, _step)


@contextmanager
def emulated(
    executor: gpu_programs.Executor,
    forward_plan: dict[str, Any] | None = None,
    backward_plan: dict[str, Any] | None = None,
) -> Iterator[str]:
    """The backend's name while it exists; what is asked of the plans, as _introspection.plan_cuda takes it."""
    _Current.executor = executor
    _Current.forward_plan = forward_plan or {}
    _Current.backward_plan = backward_plan or {}
    registry.BACKENDS[NAME] = _backend
    try:
        yield NAME
    finally:
        del registry.BACKENDS[NAME]


# ---- the plugin ----


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before conftest.py lists the backends."""
    architecture = os.environ.get("WKV_TEST_ARCHITECTURE")
    executor: gpu_programs.Executor
    if architecture is None:
        executor = gpu_programs.Emulator(gpu_programs.compile_emulator(), "shuffled")
    else:
        folder = Path(tempfile.mkdtemp())
        early_config.add_cleanup(lambda: shutil.rmtree(folder))
        executor = gpu_programs.PtxRunner(folder, architecture, "random")
    context = emulated(executor, *json.loads(os.environ.get("WKV_TEST_PLANS", "[]")))
    context.__enter__()
    early_config.add_cleanup(lambda: context.__exit__(None, None, None))
