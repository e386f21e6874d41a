"""The Triton backend beyond the tests of every backend: its plans, its interpreter run, and what it compiles to."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import (
    Problem,
    assert_close,
    assert_summaries_close,
    checkpoint_interval,
    log_denominator,
    make,
    oracle,
    solve,
)
from torch import Tensor

import rwkv_kernels
from rwkv_kernels import native
from rwkv_kernels._backends.triton import op
from rwkv_kernels._backends.triton.plan import CHECKPOINT_INTERVAL, Plan, make_packed_plan, make_plan, widths
from rwkv_kernels.inputs import Inputs

HERE = Path(__file__).parent
H100 = {"multiprocessors": 132, "warp": 32}

# ---- the suite, in Triton's interpreter ----

# The interpreter takes a millisecond a step, so it runs the whole list in float32 only, and what depends on the type.
INTERPRETED = (
    "triton and ("
    "(outputs_and_gradients and (float32 or small or above_a_checkpoint-bfloat16 or k_of_1000-float16)) or "
    "parameters_of_another_dtype or (twice_that_of_the_step_loop and 37) or "
    "nan_is_in_the_same_places or any_bits or minus_infinity_has_no_weight or without_any_weight or 16_bit_number or "
    "(nan_stays and float16) or does_not_reach_back or (far_key and 45) or (extremes and 1e-30) or "
    "steps_equal or gauge or whatever_its_max or none_is_the_empty or is_not_modified or no_steps or nothing_to_do or "
    "gate_is_exactly or nan_in_r or "
    "(summaries_equal and float32 and (above_a or u_of_minus_25 or time_major)) or "
    "plans or (opcheck and (True-True or False-False)) or check_their_arguments or float64_and_says or "
    "compiles_the_step or (compiles_whole and with_state) or exports or func_grad or test_vmap or per_sample or "
    "forward_mode"
    ")"
)
INTERPRETED_MIXING = (
    "triton and ("
    "(outputs_and_gradients and (float32 or gated_and_packed-bfloat16) and not (wide_and_long or u_of_)) or "
    "boundaries or depend or hand_their_states_on or no_steps or at_their_ends or keeps_its_digits or refused"
    ")"
)
INTERPRETED_BIDIRECTIONAL = (
    "triton and ("
    "(outputs_and_gradients and float32 and "
    "(two_intervals or image or strong or at_once or of_minus_50 or k_of_1000 or -time_major or gated_and_packed"
    " or of_all_lengths)) or "
    "(outputs_and_gradients and bfloat16 and gated_and_packed) or "
    "(nan_takes and float32-nan) or (same_places and (log_decay or -r)) or "
    "minus_infinity or without_any or (beyond and bfloat16 and inf) or depend or nothing or "
    "(extremes and 10000.0-1.0 and triton-0.0) or explains"
    ")"
)
CHOSEN = {"mixing": INTERPRETED_MIXING, "bidirectional": INTERPRETED_BIDIRECTIONAL}


@pytest.mark.ptx
@pytest.mark.skipif(op.INTERPRETED, reason="this is the interpreter's run")
@pytest.mark.skipif(op.why_unavailable() is None, reason="the compiled kernels pass these tests here")
@pytest.mark.parametrize(
    "names",
    [
        ["operator", "summaries"],
        ["special_values"],
        ["mixing"],
        ["bidirectional"],
        ["state", "errors", "torch", "triton"],
    ],
    ids=" ".join,
)
def test_the_interpreter_passes_the_same_tests(names: list[str]) -> None:
    pytest.importorskip("triton")
    files = [str(HERE / f"test_{name}.py") for name in names]
    chosen = CHOSEN.get(names[0], INTERPRETED)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    print(result.stdout[-400:])


# Chunks of one interval and of more, with and without remaining steps, and enough chunks to carry eight at a time.
@pytest.mark.parametrize(
    ("channels", "chunk_len", "T", "C", "checkpoint"),
    [
        (64, 64, 130, 80, True),
        (64, 64, 130, 80, False),
        (128, 128, 256, 150, True),
        (128, 64, 64 * 11 + 3, 3, True),
        (128, 128, 64 * 11 + 3, 3, False),
    ],
)
def test_all_plans_equal_the_oracle(
    channels: int, chunk_len: int, T: int, C: int, checkpoint: bool, triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(channels, chunk_len, -(-T // chunk_len))
    monkeypatch.setattr(op, "plan_for", lambda inputs: plan)
    tensors = make(Problem(B=1, T=T, C=C, log_decay=-0.02 if C == 3 else None, with_state=True))
    with torch.no_grad():
        y, final = rwkv_kernels.wkv(*tensors.inputs, return_state=True, backend=triton)
    if checkpoint:
        expected = solve(tensors.exact(), "reference", scale_of_state=log_denominator(final.double()))
        assert_close(solve(tensors, triton), expected, tensors)
    else:
        expected = oracle(tensors)
        found = {"y": y, "state_mean": final[:, 0] / final[:, 1], "state_log_den": log_denominator(final)}
        assert_close(found, {name: expected[name] for name in found}, tensors)


# One chunk, two, and enough to carry eight at a time, and one more; with and without remaining steps.
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("channels", "chunk_len", "B", "T", "C"),
    [(64, 64, 2, 1, 5), (64, 128, 2, 77, 80), (128, 64, 1, 128, 150), (64, 64, 2, 64 * 9 + 13, 3), (64, 64, 1, 640, 3)],
)
def test_summaries_in_all_plans_equal_the_oracle(
    channels: int, chunk_len: int, B: int, T: int, C: int, gated: bool, triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "plan_for", lambda inputs: Plan(channels, chunk_len, -(-T // chunk_len)))
    log_decay = -0.02 if C == 3 else None
    tensors = make(Problem(B=B, T=T, C=C, gated=gated, log_decay=log_decay, with_state=True))
    w, u, k, v, state = tensors.inputs
    operators = getattr(torch.ops, native.NAMESPACE)
    *_, checkpoints = operators.triton_mixing_forward(w, u, k, v, state, tensors.r, None, True)
    adjoint = operators._triton_adjoint_summary(w, u, k, v, state, tensors.r, checkpoints, tensors.gy)
    assert_summaries_close(operators._triton_summary(w, u, k, v), adjoint, tensors)


# Sequences of no steps, one chunk, several, and enough to carry eight at a time, which begin anywhere in a chunk.
@pytest.mark.parametrize("checkpoint", [True, False])
def test_packed_plans_equal_calls_of_each_sequence(checkpoint: bool, triton: str) -> None:
    lengths = (0, 3, 64 * 9 + 1, 0, 70, 0)
    tensors = make(Problem(C=6, lengths=lengths, gated=True, with_state=True))
    r, cu_seqlens, state = tensors.r, tensors.cu_seqlens, tensors.state
    assert r is not None and cu_seqlens is not None and state is not None
    packed = Inputs(tensors.w, tensors.u, tensors.k, tensors.v, state, r, cu_seqlens)

    def run(plan: Plan, inputs: Inputs, gy: Tensor, gstate: Tensor) -> tuple[Tensor, ...]:
        results, launches = op.forward(plan, inputs, checkpoint)
        op._run(launches, inputs.k.device)
        if not checkpoint:
            return results[:2]
        gradients, launches = op.backward(plan, inputs, results[2], gy, gstate)
        op._run(launches, inputs.k.device)
        return (*results[:2], *gradients[2:])

    found = run(Plan(64, 64, sum(lengths) // 64 + len(lengths)), packed, tensors.gy, tensors.gstate)
    for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if begin == end:
            continue  # tests/test_mixing.py has these
        part = slice(begin, end)
        alone = Inputs(*packed[:2], *(x[:, part] for x in packed[2:4]), state[n : n + 1], r[:, part])
        expected = run(Plan(64, 64, -(-(end - begin) // 64)), alone, tensors.gy[:, part], tensors.gstate[n : n + 1])
        own = (slice(None), part)
        places = (own, n, own, own, n, own)  # y, state_out, gk, gv, gstate, gr
        for place, x, exact in zip(places, found, expected, strict=False):
            assert torch.equal(x[place].reshape(exact.shape), exact)


# ---- torch ----


def test_triton_refuses_float64_and_says_who_can(triton: str) -> None:
    w, u, k, v, _ = make(Problem()).exact().inputs
    with pytest.raises(
        rwkv_kernels.BackendUnavailable, match=r"k is torch.float64.*Available for this call:.*reference"
    ):
        rwkv_kernels.wkv(w, u, k, v, backend=triton)
    with pytest.raises(RuntimeError, match=r"k is torch.float64, and this backend takes float32, float16 or bfloat16"):
        torch.ops.rwkv_kernels.triton_forward(w, u, k, v, None, False)


# ---- plans ----


@pytest.mark.parametrize("T", [1, 63, 64, 255, 256, 1000, 65536, 10**6])
@pytest.mark.parametrize("C", [1, 64, 65, 768, 4096])
def test_a_plan_covers_every_step_and_has_few_chunks(T: int, C: int) -> None:
    for B in (1, 8, 1000):
        plan = make_plan(B, T, C, **H100)
        assert plan.channels in widths(32) and plan.chunk_len % CHECKPOINT_INTERVAL == 0
        assert (plan.chunks - 1) * plan.chunk_len < T <= plan.chunks * plan.chunk_len
        assert plan.chunks <= 256


@pytest.mark.parametrize(
    ("B", "T", "C", "channels", "chunks"),
    [
        (8, 1024, 768, 64, 16),
        (1, 65536, 2560, 128, 79),
        (32, 1024, 2048, 128, 1),
        (1, 4096, 768, 64, 64),
        (1, 128, 768, 64, 1),
        (4096, 1, 768, 128, 1),
    ],
)
def test_the_plan_of_an_h100(B: int, T: int, C: int, channels: int, chunks: int) -> None:
    plan = make_plan(B, T, C, **H100)
    assert (plan.channels, plan.chunks) == (channels, chunks)


@pytest.mark.parametrize("total", [1, 63, 64, 255, 256, 1000, 65536, 10**6])
@pytest.mark.parametrize("N", [1, 2, 100, 5000])
def test_a_packed_plan_has_a_chunk_for_every_sequence(total: int, N: int) -> None:
    for C in (1, 64, 768, 4096):
        plan = make_packed_plan(N, total, C, **H100)
        assert plan.channels in widths(32) and plan.chunk_len % CHECKPOINT_INTERVAL == 0
        assert plan.chunks == total // plan.chunk_len + N
        assert plan.chunks - N <= 256


@pytest.mark.parametrize(
    ("N", "total", "C", "chunk_len"),
    [
        (64, 65536, 2560, 2048),  # twice the mean length: most sequences are read once
        (512, 65536, 2560, 832),  # as for one sequence: enough programs, whoever has the steps
        (8, 8192, 768, 64),
        (1, 65536, 2560, 832),
        (3, 100, 768, 128),
    ],
)
def test_the_packed_plan_of_an_h100(N: int, total: int, C: int, chunk_len: int) -> None:
    assert make_packed_plan(N, total, C, **H100).chunk_len == chunk_len


def test_the_checkpoints_are_those_of_the_compiled_operators() -> None:
    if native.operators.why_missing is not None:
        pytest.skip(native.operators.why_missing)
    assert checkpoint_interval(torch.float32) == CHECKPOINT_INTERVAL
