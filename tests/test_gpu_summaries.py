"""The GPU kernels of summaries: their phases on the host. tests/test_ptx.py runs them as compiled."""

from dataclasses import replace

import pytest
import torch
from problems import MIXING_PROBLEMS, PROBLEMS, Problem, Tensors, assert_summaries_close, make
from test_gpu_emulated import LIMITS, OVER_ANCHORS, SEVERAL_TILES
from torch import Tensor

from rwkv_kernels.inputs import DTYPES

gpu_host = pytest.importorskip("gpu_host")

CASES = PROBLEMS | {name: problem for name, problem in MIXING_PROBLEMS.items() if problem.lengths is None}


def summaries_of(executor: "gpu_host.Executor", tensors: Tensors) -> tuple[Tensor, Tensor]:
    w, u, k, v, state = tensors.inputs
    emulator = gpu_host.Emulator(limits=executor.limits)
    *_, checkpoints = gpu_host.forward(emulator, w, u, k, v, state, tensors.r, None, True)
    adjoint = gpu_host.adjoint_summary(executor, w, u, k, v, state, tensors.r, checkpoints, tensors.gy)
    return gpu_host.summary(executor, w, u, k, v), adjoint


def assert_summaries(executor: "gpu_host.Executor", problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tensors = make(problem, dtype)
    found = summaries_of(executor, tensors)
    assert_summaries_close(*found, tensors)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", LIMITS)
def test_every_plan_equals_the_oracle(limits: str, dtype: torch.dtype) -> None:
    executor = gpu_host.Emulator("shuffled", limits=LIMITS[limits])
    for name, problem in CASES.items():
        if name != "k_of_10000" or dtype != torch.float16:
            assert_summaries(executor, problem, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", LIMITS)
def test_summaries_are_what_forward_and_backward_give_to_the_last_bit(limits: str, dtype: torch.dtype) -> None:
    """But for the products and sums that a GPU's compiler fuses."""
    executor = gpu_host.Emulator(limits=LIMITS[limits])
    for problem in (CASES["gated_k_of_1000"], Problem(B=2, T=700, C=70, with_state=True), SEVERAL_TILES):
        tensors = make(problem, dtype)
        own, adjoint = summaries_of(executor, tensors)
        w, u, k, v, state = tensors.inputs
        assert torch.equal(own, gpu_host.forward(executor, w, u, k, v, None, False)[1])
        given = (w, u, k, v, state, tensors.r, None)
        *_, checkpoints = gpu_host.forward(executor, *given, True)
        assert torch.equal(adjoint, gpu_host.backward(executor, *given, checkpoints, tensors.gy, None)[4][:, :2])


@pytest.mark.parametrize("dtype", DTYPES, ids=gpu_host.name_of)
@pytest.mark.parametrize("limits", ["H100", "small_tiles"])
def test_the_order_of_threads_and_blocks_changes_no_bit(limits: str, dtype: torch.dtype) -> None:
    for problem in (*OVER_ANCHORS.values(), replace(SEVERAL_TILES, gated=True), replace(SEVERAL_TILES, k_scale=20.0)):
        expected = assert_summaries(gpu_host.Emulator(limits=LIMITS[limits]), problem, dtype)
        for order, seed in (("reversed", 0), ("shuffled", 1)):
            found = summaries_of(gpu_host.Emulator(order, seed, limits=LIMITS[limits]), make(problem, dtype))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (order, seed)
