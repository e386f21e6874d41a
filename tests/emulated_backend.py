"""A backend "emulated" for tests: the GPU's operators by one of the executors of gpu_host, on CPU tensors.

As a pytest plugin (-p emulated_backend) it runs the whole suite on them: on the C++ phases, or with
WKV_TEST_ARCHITECTURE=sm_90 on the PTX of that architecture. WKV_TEST_MULTIPROCESSORS makes the device smaller.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpu_host
import pytest
import torch
from problems import checkpoint_interval
from torch import Tensor

from rwkv_kernels import autograd
from rwkv_kernels._backends import registry

NAME = "emulated"


class _Current:
    executor: gpu_host.Executor


_library = torch.library.Library("rwkv_kernels_emulated", "FRAGMENT")


def _step(*arguments: Any) -> Tensor:
    return gpu_host.step(_Current.executor, *arguments)


autograd.define(
    _library,
    NAME,
    "cpu",
    lambda *arguments: gpu_host.forward(_Current.executor, *arguments),
    lambda *arguments: gpu_host.backward(_Current.executor, *arguments),
)
autograd.define_bi(
    _library,
    f"{NAME}_bi",
    "cpu",
    lambda *arguments: gpu_host.bi_forward(_Current.executor, *arguments),
    lambda *arguments: gpu_host.bi_backward(_Current.executor, *arguments),
)
_forward, _ = autograd.attach(_library, NAME, checkpoint_interval)
_bi_forward = autograd.attach_bi(_library, f"{NAME}_bi", checkpoint_interval)
_backend = registry.Backend(NAME, _forward, _step, _bi_forward, device_types=("cpu",))


@contextmanager
def emulated(executor: gpu_host.Executor) -> Iterator[str]:
    """The backend's name while it exists."""
    _Current.executor = executor
    registry.register(_backend)
    try:
        yield NAME
    finally:
        del registry.BACKENDS[NAME]


# ---- the plugin ----


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before conftest.py lists the backends."""
    architecture = os.environ.get("WKV_TEST_ARCHITECTURE")
    multiprocessors = os.environ.get("WKV_TEST_MULTIPROCESSORS")
    limits = {**gpu_host.H100, **({"multiprocessors": int(multiprocessors)} if multiprocessors else {})}
    executor: gpu_host.Executor
    if architecture is None:
        executor = gpu_host.Emulator("shuffled", limits=limits)
    else:
        executor = gpu_host.PtxRunner(architecture, "shuffled", limits=limits)
    context = emulated(executor)
    context.__enter__()
    early_config.add_cleanup(lambda: context.__exit__(None, None, None))
