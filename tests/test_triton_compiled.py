"""The Triton kernels as compiled for GPUs that need not be here: registers, variants, and their PTX on the CPU."""

from typing import Any

import bi_problems
import numpy
import ptx
import pytest
import torch
from problems import (
    Problem,
    assert_close,
    assert_summaries_close,
    assert_tensor_close,
    log_denominator,
    make,
    solve,
    tolerance,
)
from torch import Tensor

from rwkv_kernels._backends.triton import op
from rwkv_kernels._backends.triton.op import Launch
from rwkv_kernels._backends.triton.plan import Plan
from rwkv_kernels.inputs import BiInputs, Inputs

triton = pytest.importorskip("triton")
triton_report = pytest.importorskip("triton_report")
if op.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

# ---- registers and variants ----


# Triton 3.6 spills two or three registers on AMD's GPUs.
COMPILES_FOR_AMD = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

# An H100 has 132 multiprocessors that issue for 128 threads at 1.755 GHz, and its memory delivers 3 TB/s: with this
# many instructions for each byte that has to be moved, memory is still the bound.
INSTRUCTIONS_PER_BYTE = 132 * 128 * 1.755e9 / 3e12
BYTES_OF_BFLOAT16 = {"summarise_states": 4, "forward": 6, "summarise_adjoints": 6, "backward": 10}
BYTES_OF_A_GATE = {"forward": 2, "summarise_adjoints": 2, "backward": 4}


# `make kernel-report` compiles for every pair of the two, and each of the gate and packed sequences alone.
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_80", torch.float32),
        ("sm_90", torch.bfloat16),
        ("sm_100", torch.float16),
        ("gfx90a", torch.float32),
        ("gfx942", torch.bfloat16),
    ],
    ids=str,
)
def test_no_kernel_spills(target: str, dtype: torch.dtype) -> None:
    if target.startswith("gfx") and not COMPILES_FOR_AMD:
        pytest.skip(f"the claim is about Triton 3.7 and newer, and this is {triton.__version__}")
    for row in triton_report.rows(target, [dtype], forms=triton_report.EXTREMES):
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes == 0 or row.kernel == "reduce", row
        if target == "sm_90" and row.kernel in BYTES_OF_BFLOAT16:
            moved = BYTES_OF_BFLOAT16[row.kernel] + (BYTES_OF_A_GATE[row.kernel] if "gated" in row.form else 0)
            assert row.instructions is not None
            assert row.instructions <= INSTRUCTIONS_PER_BYTE * moved, row


# B and T are one and many, C one tile of channels and several.
SIZES = [(B, T, 64 * tiles) for B in (1, 3) for T in (1, 2, 63, 64, 65, 300, 1024, 1025) for tiles in (1, 2, 5)]


def test_new_sizes_compile_nothing_new() -> None:
    """By the keys that decide in Triton whether to compile."""
    launches = [
        launch
        for B, T, C in SIZES
        for launch in triton_report.launches_of(Plan(128, 64, -(-T // 64)), torch.bfloat16, B, T, C)
    ]
    assert set(triton_report.variants(launches).values()) == {1}


def test_new_lengths_compile_nothing_new() -> None:
    launches = [
        launch
        for N in (1, 2, 100)
        for total in (1, 63, 64, 129, 300, 1025)
        for launch in triton_report.launches_of(
            Plan(128, 64, total // 64 + N), torch.bfloat16, 1, total, 128, gated=True, sequences=N
        )
    ]
    assert {n for name, n in triton_report.variants(launches).items() if name != "step"} == {1}


def test_fifty_shapes_compile_a_variant_for_each_width_and_alignment() -> None:
    assert len(set(triton_report.SWEEP)) == 50
    assert max(triton_report.variants(triton_report.launches_of_sweep()).values()) == 4


# ---- their PTX, on the CPU ----


runs_ptx = pytest.mark.skipif(ptx.unavailable() is not None, reason=str(ptx.unavailable()))


def _memory(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    """The storage from the tensor's address on."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return storage[tensor.storage_offset() * tensor.element_size() :]


def _run(launches: list[Launch], order: str = "forward") -> None:
    for launch in launches:
        compiled = triton_report.compile_launch(launch, triton_report.TARGETS["sm_90"])
        arguments = [_memory(x) if isinstance(x, Tensor) else x for x in launch.arguments if x is not None]
        # Triton appends pointers to its scratch memory, which these kernels do not use.
        ptx.Kernel(compiled.asm["ptx"], compiled.metadata.name).run(
            [*arguments, None, None],
            grid=launch.programs,
            threads=32 * launch.warps,
            shared_bytes=compiled.metadata.shared,
            order=order,
        )


PTX_CASES = {
    "bfloat16": (Problem(B=2, T=150, C=80, with_state=True), torch.bfloat16, Plan(64, 64, 3)),
    "float32_wide": (Problem(B=1, T=771, C=144, with_state=True), torch.float32, Plan(128, 64, 13)),
    "odd_float16": (Problem(B=2, T=131, C=19, layout="every_second_channel"), torch.float16, Plan(64, 128, 2)),
    "strided": (Problem(B=3, T=70, C=32, layout="time_major"), torch.bfloat16, Plan(64, 128, 1)),
    "k_of_1000": (Problem(B=1, T=130, C=16, k_scale=1000.0, with_state=True), torch.float32, Plan(64, 64, 3)),
    "strong_decay": (Problem(B=1, T=70, C=16, log_decay=-1e4, u=50.0), torch.float32, Plan(64, 64, 2)),
    "gated_bfloat16": (Problem(B=2, T=150, C=80, gated=True, with_state=True), torch.bfloat16, Plan(64, 64, 3)),
    "packed": (Problem(C=80, lengths=(0, 150, 1, 64, 0), with_state=True), torch.float32, Plan(64, 64, 8)),
    "gated_packed_odd_float16": (
        Problem(C=19, lengths=(3, 0, 300, 66), gated=True, with_state=True, layout="every_second_channel"),
        torch.float16,
        Plan(64, 64, 9),
    ),
}


@pytest.mark.ptx
@runs_ptx
@pytest.mark.parametrize("name", PTX_CASES)
def test_ptx_equals_the_oracle(name: str) -> None:
    problem, dtype, plan = PTX_CASES[name]
    tensors = make(problem, dtype)
    inputs = Inputs(*tensors.inputs, **tensors.options)
    (y, final, checkpoints), launches = op.forward(plan, inputs, True)
    _run(launches)
    scale = log_denominator(final.double())
    gstate = tensors.gstate.clone()
    gstate[:, :2] *= torch.exp(final[:, 2].double() - scale)[:, None]
    gstate[:, 2] = 0  # of no use to steps; a sequence without any hands it on
    gradients, launches = op.backward(plan, inputs, checkpoints, tensors.gy, gstate)
    _run(launches)
    found = {"y": y, "state_mean": final[:, 0] / final[:, 1], "state_log_den": log_denominator(final)}
    found |= dict(zip(("gw", "gu", "gk", "gv", "gstate", "gr"), gradients, strict=True))
    expected = solve(tensors.exact(), "reference", scale_of_state=scale)
    assert_close(found, expected, tensors)


@pytest.mark.ptx
@runs_ptx
@pytest.mark.parametrize("name", ["bfloat16", "float32_wide", "k_of_1000", "gated_bfloat16"])
def test_ptx_of_summaries_equals_the_oracle(name: str) -> None:
    problem, dtype, plan = PTX_CASES[name]
    tensors = make(problem, dtype)
    inputs = Inputs(*tensors.inputs, tensors.r)
    (_, _, checkpoints), launches = op.forward(plan, inputs, True)
    _run(launches)
    (own, of_own), (adjoint, of_adjoint) = (
        op.summary(plan, tensors.w, tensors.k, tensors.v),
        op.adjoint_summary(plan, inputs, checkpoints, tensors.gy),
    )
    _run(of_own + of_adjoint)
    assert_summaries_close(own, adjoint, tensors)


BI_PTX_CASES = {
    "an_image": (Problem(B=2, T=61, C=80, log_decay=bi_problems.EITHER_SIGN), torch.float32),
    "gated_bfloat16": (Problem(B=2, T=70, C=64, gated=True), torch.bfloat16),
    "growing": (Problem(B=1, T=130, C=16, log_decay=3.0), torch.float32),
    "k_of_1000": (Problem(B=1, T=66, C=16, k_scale=1000.0), torch.float32),
    "gated_packed_odd_float16": (
        Problem(C=19, lengths=(3, 0, 70, 1), gated=True, layout="every_second_channel"),
        torch.float16,
    ),
}


@pytest.mark.ptx
@runs_ptx
@pytest.mark.parametrize("name", BI_PTX_CASES)
def test_ptx_bidirectional_equals_the_sum(name: str) -> None:
    problem, dtype = BI_PTX_CASES[name]
    tensors = bi_problems.make(problem, dtype)
    inputs = BiInputs(*tensors.inputs, **tensors.options)
    y, launches = op.bi_forward(64, inputs)
    _run(launches)
    gradients, launches = op.bi_backward(64, inputs, tensors.gy)
    _run(launches)
    found = {"y": y, **dict(zip(("glog_decay", "gu", "gk", "gv", "gr"), gradients, strict=True))}
    bi_problems.assert_all_close(found, tensors)


@pytest.mark.ptx
@runs_ptx
def test_ptx_the_gauge_of_a_checkpoint_does_not_matter() -> None:
    tensors = make(Problem(B=1, T=331, C=80, with_state=True))
    inputs = Inputs(*tensors.inputs)
    for plan in (Plan(64, 64, 6), Plan(64, 384, 1)):
        (_, _, checkpoints), launches = op.forward(plan, inputs, True)
        _run(launches)
        moved = checkpoints.clone()
        moved[:, 1:3, :2] *= torch.exp(torch.tensor(5.0))
        moved[:, 1:3, 2] -= 5.0
        found, expected = (
            op.backward(plan, inputs, given, tensors.gy, tensors.gstate) for given in (moved, checkpoints)
        )
        _run(found[1] + expected[1])
        for name, a, b in zip(("gw", "gu", "gk", "gv", "gstate"), found[0][:5], expected[0][:5], strict=True):
            assert_tensor_close(name, a, b, tolerance(torch.float32, 331, 10.0))


BAD_BOUNDARIES = {
    "beyond_the_end": [0, 90, 10**9, 2**31 - 1],
    "before_the_start": [-(2**31), -5, 100, 300],
    "falling": [300, 200, 100, 0],
    "falling_and_rising": [0, 290, 3, 300],
    "none_of_the_steps": [0, 0, 0, 0],
    "all_from_one_step": [299, 300, 300, 300],
}


@pytest.mark.ptx
@runs_ptx
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BAD_BOUNDARIES)
def test_ptx_stays_within_the_tensors_whatever_the_boundaries(name: str, dtype: torch.dtype) -> None:
    """The runner reports every access outside of them, and every program ends."""
    tensors = make(Problem(C=19, lengths=(90, 140, 70), gated=True, with_state=True))
    boundaries = torch.tensor(BAD_BOUNDARIES[name]) << (16 if dtype == torch.int64 and "the" in name else 0)
    inputs = Inputs(*tensors.inputs, tensors.r, boundaries.to(dtype))
    plan = Plan(64, 64, 300 // 64 + 3)
    for checkpoint in (False, True):
        (_, _, checkpoints), launches = op.forward(plan, inputs, checkpoint)
        _run(launches)
    _run(op.backward(plan, inputs, checkpoints, tensors.gy, tensors.gstate)[1])
    both = BiInputs(*tensors.inputs[:4], tensors.r, boundaries.to(dtype))
    _run(op.bi_forward(64, both)[1])
    _run(op.bi_backward(64, both, tensors.gy)[1])


@pytest.mark.ptx
@runs_ptx
def test_ptx_does_not_depend_on_the_order_of_programs_and_threads() -> None:
    tensors = make(Problem(B=2, T=331, C=80, with_state=True), torch.bfloat16)
    plan, results = Plan(64, 64, 6), []
    for order in ("forward", "reversed", "shuffled"):
        (y, final, checkpoints), launches = op.forward(plan, Inputs(*tensors.inputs), True)
        _run(launches, order)
        gradients, launches = op.backward(plan, Inputs(*tensors.inputs), checkpoints, tensors.gy, tensors.gstate)
        _run(launches, order)
        results.append((y, final, checkpoints, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.ptx
@runs_ptx
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ptx_steps_equal_the_oracle(dtype: torch.dtype, gated: bool) -> None:
    tensors = make(Problem(B=3, T=1, C=70, with_state=True), dtype)
    w, u, k, v, state = tensors.inputs
    assert w is not None and u is not None and k is not None and v is not None and state is not None
    expected = solve(tensors.exact(), "reference")
    r = tensors.gy[:, 0] if gated else None
    if r is not None:
        expected["y"] *= r.double().sigmoid()[:, None]
    after = state.clone()
    y, launches = op.step(w, u, k[:, 0], v[:, 0], after, r)
    _run(launches)
    found = {"y": y[:, None], "state_mean": after[:, 0] / after[:, 1], "state_log_den": log_denominator(after)}
    assert_close(found, {name: expected[name] for name in found}, tensors)
