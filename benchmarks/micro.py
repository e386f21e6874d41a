"""Micro-benchmarks for developers, by pytest-benchmark; their data is in the cache.

`make bench-micro MICRO="--benchmark-autosave"` before a change, `MICRO="--benchmark-compare"` after it.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import rwkv_kernels
from benchmarks.device import Device
from benchmarks.op import backends, function_of, name_of, written
from benchmarks.problem import Problem, Shape

SHAPES: list[Shape] = [(1, 1, 768), (1, 64, 768), (8, 256, 768)]
DEVICE = Device("cuda" if torch.cuda.is_available() else "cpu")

BACKENDS = pytest.mark.parametrize("backend", backends(DEVICE))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=written)


def _problem(shape: Shape, dtype: torch.dtype) -> Problem:
    with DEVICE.default():
        return Problem(shape, dtype)


def _measure(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    def finished() -> None:
        call()
        DEVICE.synchronize()

    benchmark(finished)


@BACKENDS
@DTYPES
@ALL_SHAPES
def test_forward(benchmark: BenchmarkFixture, backend: str, dtype: torch.dtype, shape: Shape) -> None:
    problem, function = _problem(shape, dtype), function_of(backend)
    problem.check(function)
    _measure(benchmark, lambda: problem.forward(function))


@BACKENDS
@DTYPES
@ALL_SHAPES
def test_backward(benchmark: BenchmarkFixture, backend: str, dtype: torch.dtype, shape: Shape) -> None:
    problem = _problem(shape, dtype)
    _measure(benchmark, problem.prepare_backward(function_of(backend)))


@BACKENDS
@DTYPES
def test_step(benchmark: BenchmarkFixture, backend: str, dtype: torch.dtype) -> None:
    B, C = 8, 768
    with DEVICE.default():
        w, u, state = torch.randn(C), torch.randn(C), rwkv_kernels.empty_state(B, C)
        k, v = torch.randn(2, B, C, dtype=dtype)
    _measure(benchmark, lambda: rwkv_kernels.wkv_step(w, u, k, v, state, r=v, backend=backend))
