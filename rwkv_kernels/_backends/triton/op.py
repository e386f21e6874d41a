"""The Triton operators: whether they can run here, what they launch, and their registration with torch.

Launches are data, so that tests and reports can run or compile what the operators would. Triton itself is imported by
the first call that needs it, and never by `import rwkv_kernels`.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import autograd, native
from ...inputs import SEQUENCE, STATE, TOKEN, BiInputs, Inputs, Row, check, check_like
from ...reference import empty_state
from ..registry import Backend, constant
from .plan import (
    BI_BACKWARD_PARKED,
    BI_FORWARD_PARKED,
    CARRIED_CHANNELS,
    CHECKPOINT_INTERVAL,
    PARKED_STATES,
    REGISTERS,
    REPLAYED_STEPS,
    Plan,
    ceil_div,
    make_packed_plan,
    make_plan,
    widths,
)

__all__ = [
    "BACKEND",
    "DEVICE",
    "INTERPRETED",
    "Launch",
    "adjoint_summary",
    "backward",
    "bi_backward",
    "bi_forward",
    "forward",
    "kernel_of",
    "plan_for",
    "step",
    "summary",
]

# Triton's interpreter runs kernels on the CPU with NumPy: for tests. Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"  # which is what torch calls AMD's GPUs, too

# ---- whether it can run ----


@constant
def why_unavailable() -> str | None:
    """Why this machine cannot run Triton kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (torch for CUDA or ROCm on Linux brings it along)"
    if not INTERPRETED and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable GPU, and Triton compiles for GPUs alone"
    try:
        importlib.import_module(".bidirectional", __package__)
    except Exception as error:  # whatever a broken installation raises
        return f"Triton does not load ({type(error).__name__}: {error})"
    return None


# ---- launches ----


@dataclass(frozen=True)
class Launch:
    """A kernel by its name in kernels.py, the number of programs, and its arguments in their order."""

    kernel: str
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, int]
    warps: int = 1
    registers: int | None = None  # that a thread may have on NVIDIA's GPUs; None leaves it to the compiler

    def options(self, device: str) -> dict[str, Any]:
        """The options of Triton's compiler for a GPU that it calls `device`: cuda or hip."""
        limit = {"maxnreg": self.registers} if device == "cuda" and self.registers is not None else {}
        return {"num_warps": self.warps, "enable_fp_fusion": True, **limit}


# Every address and stride of a call is a multiple of this, or nothing is assumed: two variants of a kernel, not one for
# each combination.
ALIGNMENT = 16


def _alignment(*tensors: Tensor | None) -> int:
    for x in tensors:
        if x is not None and (
            x.data_ptr() % ALIGNMENT or x.shape[-1] % ALIGNMENT or any(s % ALIGNMENT for s in x.stride()[:-1])
        ):
            return 1
    return ALIGNMENT


def _with_contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(alignment: int, is_packed: bool, *sequences: Tensor | None) -> tuple[int, ...]:
    """From the start of a sequence to the next start that there may be, and from step to step."""
    strides = ((0, 0) if x is None else x.stride()[is_packed:2] for x in sequences)
    return tuple(s[i] // alignment for s in strides for i in (0, -1))


@functools.cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and threads of a warp."""
    if device.type == "cpu":
        return 1, 32
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.warp_size


def plan_for(inputs: Inputs) -> Plan:
    """The plan of a call with these inputs, forward or backward."""
    B, T, C = inputs.k.shape
    limits = _device_limits(inputs.k.device)
    if inputs.cu_seqlens is None:
        return make_plan(B, T, C, *limits)
    return make_packed_plan(inputs.sequences, T, C, *limits)


def _float32(k: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=k.device)


def _checkpoints(inputs: Inputs, wanted: bool) -> Tensor:
    B, rows, *state = inputs.checkpoint_shape(CHECKPOINT_INTERVAL)
    return _float32(inputs.k, B, rows if wanted else 0, *state)


def forward(plan: Plan, inputs: Inputs, checkpoint: bool) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs of forward, and the launches that fill them; there is a sequence, and B, T and C are at least 1."""
    w, u, k, v, state, r, cu_seqlens = inputs
    B, T, C = k.shape
    k, v = _with_contiguous_channels(k), _with_contiguous_channels(v)
    r = None if r is None else _with_contiguous_channels(r)
    w, u = w.contiguous(), u.contiguous()
    state = None if state is None else state.contiguous()
    y = torch.empty((B, T, C), dtype=k.dtype, device=k.device)
    state_out = _float32(k, inputs.sequences, 3, C)
    checkpoints = _checkpoints(inputs, checkpoint)

    is_packed = cu_seqlens is not None
    cuts = _cuts(plan, inputs)
    # The state after a chunk is a checkpoint, if these are wanted.
    if checkpoint:
        states, rows_per_chunk = checkpoints, plan.chunk_len // CHECKPOINT_INTERVAL
    else:
        states, rows_per_chunk = _float32(k, B, plan.chunks if is_packed else cuts, 3, C), 1
    alignment = _alignment(w, u, k, v, state, r)
    strides = _strides(alignment, is_packed, k, v)
    chunks = (plan.chunk_len, plan.chunks, states.shape[1], rows_per_chunk)
    constants = {"CHANNELS": plan.channels, "ALIGNMENT": alignment}
    C_aligned, tiles = C // alignment, ceil_div(C, plan.channels)

    launches, of_cuts = [], constants | {"ALL": False}
    if plan.chunk_len < T:
        arguments: tuple[Any, ...] = (w, k, v, state, cu_seqlens, states, *strides, C_aligned, *chunks, T)
        launches.append(Launch("summarise_states", tiles * B * cuts, arguments, of_cuts))
    if 2 * plan.chunk_len < T:
        arguments = (w, cu_seqlens, states, C_aligned, *chunks, T)
        launches.append(_carry("carry_states", len(state_out), C, arguments, of_cuts))
    strides += _strides(alignment, is_packed, r)
    saved = checkpoints if checkpoint else None
    arguments = (w, u, k, v, state, r, cu_seqlens, states, y, state_out, saved, *strides, T, C_aligned, *chunks)
    launches.append(Launch("forward", tiles * B * plan.chunks, arguments, constants))
    return (y, state_out, checkpoints), launches


def backward(
    plan: Plan, inputs: Inputs, checkpoints: Tensor, gy: Tensor, gstate_out: Tensor | None
) -> tuple[tuple[Tensor, ...], list[Launch]]:
    """The gradients of all inputs but cu_seqlens, and the launches that fill them; sizes are as for forward."""
    w, u, k, v, state, r, cu_seqlens = inputs
    B, T, C = k.shape
    k, v, gy = (_with_contiguous_channels(x) for x in (k, v, gy))
    r = None if r is None else _with_contiguous_channels(r)
    w, u, checkpoints = w.contiguous(), u.contiguous(), checkpoints.contiguous()
    state = None if state is None else state.contiguous()
    gstate_out = None if gstate_out is None else gstate_out.contiguous()
    gk, gv, gr = (torch.empty((B, steps, C), dtype=k.dtype, device=k.device) for steps in (T, T, 0 if r is None else T))
    gw, gu, gstate = torch.empty_like(w), torch.empty_like(u), _float32(k, inputs.sequences, 3, C)
    cuts = _cuts(plan, inputs)
    adjoints, partials = _float32(k, B, cuts, 2, C), _float32(k, B, plan.chunks, 2, C)

    alignment = _alignment(w, u, k, v, gy, state, r, checkpoints, gstate_out)
    strides = _strides(alignment, cu_seqlens is not None, k, v, r, gy)
    constants = {"CHANNELS": plan.channels, "ALIGNMENT": alignment}
    sizes = (T, C // alignment, plan.chunk_len, plan.chunks)
    tiles = ceil_div(C, plan.channels)
    parked = _float32(k, tiles * B * plan.chunks, PARKED_STATES, 3, plan.channels)

    launches, of_cuts = [], constants | {"ALL": False}
    given = (w, u, k, v)
    saved = (cu_seqlens, gy, checkpoints, gstate_out, adjoints)
    if plan.chunk_len < T:
        arguments: tuple[Any, ...] = (*given, None, r, *saved, *strides, *sizes)
        launches.append(Launch("summarise_adjoints", tiles * B * cuts, arguments, of_cuts))
    if 2 * plan.chunk_len < T:
        arguments = (w, None, cu_seqlens, checkpoints, adjoints, *sizes)
        launches.append(_carry("carry_adjoints", len(gstate), C, arguments, of_cuts))
    results = (gk, gv, gstate, None if r is None else gr)
    arguments = (*given, state, r, *saved, parked, *results, partials, *strides, *sizes)
    registers = None if r is None else REGISTERS.get(plan.channels)
    launches.append(Launch("backward", tiles * B * plan.chunks, arguments, constants, registers=registers))
    launches.append(_reduction(w, partials, gw, gu))
    return (gw, gu, gk, gv, gstate, gr), launches


def summary(plan: Plan, w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Launch]]:
    """The state that the steps leave behind an empty one, and the launches that fill it; sizes are as for forward."""
    B, T, C = k.shape
    w, k, v = w.contiguous(), _with_contiguous_channels(k), _with_contiguous_channels(v)
    states = _float32(k, B, plan.chunks, 3, C)
    alignment = _alignment(w, k, v)
    sizes = (C // alignment, plan.chunk_len, plan.chunks, plan.chunks, 1, T)
    arguments: tuple[Any, ...] = (w, k, v, None, None, states, *_strides(alignment, False, k, v), *sizes)
    constants = {"CHANNELS": plan.channels, "ALIGNMENT": alignment, "ALL": True}
    launches = [Launch("summarise_states", ceil_div(C, plan.channels) * B * plan.chunks, arguments, constants)]
    if plan.chunks > 1:
        launches.append(_carry("carry_states", B, C, (w, None, states, *sizes), constants))
    return states[:, -1], launches


def adjoint_summary(plan: Plan, inputs: Inputs, checkpoints: Tensor, gy: Tensor) -> tuple[Tensor, list[Launch]]:
    """The adjoint of (num, den) before the steps where the one after them is zero, and the launches that fill it."""
    w, u, k, v, state, r, _ = inputs
    B, T, C = k.shape
    k, v, gy = (_with_contiguous_channels(x) for x in (k, v, gy))
    r = None if r is None else _with_contiguous_channels(r)
    w, u, checkpoints = w.contiguous(), u.contiguous(), checkpoints.contiguous()
    state = None if state is None else state.contiguous()
    adjoints = _float32(k, B, plan.chunks, 2, C)
    alignment = _alignment(w, u, k, v, gy, state, r, checkpoints)
    sizes = (T, C // alignment, plan.chunk_len, plan.chunks)
    given = (w, u, k, v, state, r, None, gy, checkpoints, None, adjoints)
    arguments: tuple[Any, ...] = (*given, *_strides(alignment, False, k, v, r, gy), *sizes)
    constants = {"CHANNELS": plan.channels, "ALIGNMENT": alignment, "ALL": True}
    launches = [Launch("summarise_adjoints", ceil_div(C, plan.channels) * B * plan.chunks, arguments, constants)]
    if plan.chunks > 1:
        launches.append(_carry("carry_adjoints", B, C, (w, state, None, checkpoints, adjoints, *sizes), constants))
    return adjoints[:, 0], launches


def _cuts(plan: Plan, inputs: Inputs) -> int:
    """The chunks of an element of the batch that may have one after them in their sequence."""
    return plan.chunks - (1 if inputs.cu_seqlens is None else inputs.sequences)


def _carry(kernel: str, sequences: int, C: int, arguments: tuple[Any, ...], of_chunks: dict[str, int]) -> Launch:
    constants = of_chunks | {"CHANNELS": CARRIED_CHANNELS}
    return Launch(kernel, ceil_div(C, CARRIED_CHANNELS) * sequences, arguments, constants)


def _reduction(w: Tensor | None, partials: Tensor, gw: Tensor, gu: Tensor) -> Launch:
    B, chunks, _, C = partials.shape
    channels = 32
    arguments = (w, partials, gw, gu, C, B * chunks)
    return Launch("reduce", ceil_div(C, channels), arguments, {"CHANNELS": channels, "ROWS": 32}, warps=4)


def step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None) -> tuple[Tensor, list[Launch]]:
    """y of a step, and the launch that fills it and moves the state; B and C are at least 1."""
    B, C = k.shape
    k, v = _with_contiguous_channels(k), _with_contiguous_channels(v)
    r = None if r is None else _with_contiguous_channels(r)
    y = torch.empty((B, C), dtype=k.dtype, device=k.device)
    strides = (k.stride(0), v.stride(0), 0 if r is None else r.stride(0), *state.stride())
    arguments = (w.contiguous(), u.contiguous(), k, v, r, state, y, *strides, C)
    channels, _ = widths(_device_limits(k.device)[1])
    return y, [Launch("step", B * ceil_div(C, channels), arguments, {"CHANNELS": channels})]


def _bi_sizes(inputs: BiInputs, channels: int, alignment: int) -> tuple[tuple[int, ...], int]:
    """The last arguments of a bidirectional kernel, and the number of its programs: each has a whole sequence."""
    B, T, C = inputs.k.shape
    slots = B * T // REPLAYED_STEPS + inputs.sequences * (REPLAYED_STEPS - 1)
    return (T, C // alignment, slots), inputs.sequences * ceil_div(C, channels)


def bi_forward(channels: int, inputs: BiInputs) -> tuple[Tensor, list[Launch]]:
    """y of bi_wkv, and the launch that fills it, with so many channels in a program; sizes are as for forward."""
    log_decay, u, k, v, r, cu_seqlens = inputs
    k, v = _with_contiguous_channels(k), _with_contiguous_channels(v)
    r = None if r is None else _with_contiguous_channels(r)
    log_decay, u = log_decay.contiguous(), u.contiguous()
    y = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    alignment = _alignment(log_decay, u, k, v, r)
    sizes, programs = _bi_sizes(inputs, channels, alignment)
    parked = _float32(k, ceil_div(k.shape[2], channels), sizes[-1], BI_FORWARD_PARKED, channels)
    strides = _strides(alignment, cu_seqlens is not None, k, v, r)
    arguments = (log_decay, u, k, v, r, cu_seqlens, parked, y, *strides, *sizes)
    return y, [Launch("bi_forward", programs, arguments, {"CHANNELS": channels, "ALIGNMENT": alignment})]


def bi_backward(channels: int, inputs: BiInputs, gy: Tensor) -> tuple[tuple[Tensor, ...], list[Launch]]:
    """The gradients of all inputs of bi_wkv but cu_seqlens, and the launches that fill them."""
    log_decay, u, k, v, r, cu_seqlens = inputs
    B, T, C = k.shape
    k, v, gy = (_with_contiguous_channels(x) for x in (k, v, gy))
    r = None if r is None else _with_contiguous_channels(r)
    log_decay, u = log_decay.contiguous(), u.contiguous()
    gk, gv, gr = (torch.empty((B, steps, C), dtype=k.dtype, device=k.device) for steps in (T, T, 0 if r is None else T))
    g_log_decay, gu = torch.empty_like(log_decay), torch.empty_like(u)
    alignment = _alignment(log_decay, u, k, v, gy, r)
    sizes, programs = _bi_sizes(inputs, channels, alignment)
    parked = _float32(k, ceil_div(C, channels), sizes[-1], BI_BACKWARD_PARKED, channels)
    partials = _float32(k, 1, inputs.sequences, 2, C)
    strides = _strides(alignment, cu_seqlens is not None, k, v, r, gy)
    results = (gk, gv, None if r is None else gr)
    arguments = (log_decay, u, k, v, r, cu_seqlens, gy, parked, *results, partials, *strides, *sizes)
    constants = {"CHANNELS": channels, "ALIGNMENT": alignment}
    launches = [
        Launch("bi_backward", programs, arguments, constants, registers=255),
        _reduction(None, partials, g_log_decay, gu),
    ]
    return (g_log_decay, gu, gk, gv, gr), launches


def kernel_of(launch: Launch) -> Any:
    """The kernel of a launch."""
    from . import bidirectional, kernels

    return getattr(bidirectional if launch.kernel in bidirectional.__all__ else kernels, launch.kernel)


def _run(launches: list[Launch], device: torch.device) -> None:
    compiled_for = "hip" if torch.version.hip else "cuda"
    on_device: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device:
        for launch in launches:
            kernel = kernel_of(launch)
            kernel[(launch.programs,)](*launch.arguments, **launch.constants, **launch.options(compiled_for))


# ---- operators ----
#
# rwkv_kernels.functional checks the arguments of the public functions; the checks here keep a direct call of the
# operators from touching memory it should not.


def _check(axes: tuple[str, ...], w: Tensor, u: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> None:
    refusal = BACKEND.why_elsewhere(k) or why_unavailable()
    if refusal is not None:
        raise RuntimeError(refusal)
    check(axes, w, u, k, v, *others)


def _forward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, checkpoint = arguments
    inputs = Inputs(*given)
    _check(SEQUENCE, *inputs)
    k, state = inputs.k, inputs.state
    if k.numel() == 0 or inputs.sequences == 0:
        # No steps leave the state as it is, an empty one in its normal form.
        after = empty_state(k, inputs.sequences)
        if state is not None:
            after = torch.where(state[:, 1:2] == 0, after, state)
        return k.new_empty(k.shape), after, _checkpoints(inputs, checkpoint)
    results, launches = forward(plan_for(inputs), inputs, checkpoint)
    _run(launches, k.device)
    return results


def _check_gradients(inputs: Inputs, checkpoints: Tensor, gy: Tensor, gstate_out: Tensor | None) -> None:
    k, float32 = inputs.k, (torch.float32,)
    rows: list[Row] = [
        ("gy", gy, SEQUENCE, k.shape, (k.dtype,)),
        ("checkpoints", checkpoints, ("B", "n", 3, "C"), inputs.checkpoint_shape(CHECKPOINT_INTERVAL), float32),
    ]
    if gstate_out is not None:
        rows.append(("gstate_out", gstate_out, STATE, (inputs.sequences, 3, k.shape[2]), float32))
    check_like(k, rows)


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    *given, checkpoints, gy, gstate_out = arguments
    inputs = Inputs(*given)
    _check(SEQUENCE, *inputs)
    _check_gradients(inputs, checkpoints, gy, gstate_out)
    k, state_shape = inputs.k, (inputs.sequences, 3, inputs.k.shape[2])
    if k.numel() == 0 or inputs.sequences == 0:
        gstate = _float32(k, *state_shape).zero_() if gstate_out is None else gstate_out.clone()
        gw, gu, gk, gv, _, gr = (torch.zeros_like(x) for x in inputs.gradients(checkpoints))
        results: tuple[Tensor, ...] = (gw, gu, gk, gv, gstate, gr)
    else:
        results, launches = backward(plan_for(inputs), inputs, checkpoints, gy, gstate_out)
        _run(launches, k.device)
    # The plain operator has five inputs and as many gradients; of seven inputs, cu_seqlens has none.
    return results[: len(given)]


def _summary_operator(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    inputs = Inputs(w, u, k, v, None)
    _check(SEQUENCE, *inputs)
    if k.numel() == 0:
        return empty_state(k, k.shape[0])
    state, launches = summary(plan_for(inputs), w, k, v)
    _run(launches, k.device)
    return state.contiguous()


def _adjoint_summary_operator(*arguments: Any) -> Tensor:
    *given, checkpoints, gy = arguments
    inputs = Inputs(*given)
    _check(SEQUENCE, *inputs)
    _check_gradients(inputs, checkpoints, gy, None)
    k = inputs.k
    if k.numel() == 0:
        return _float32(k, k.shape[0], 2, k.shape[2]).zero_()
    adjoint, launches = adjoint_summary(plan_for(inputs), inputs, checkpoints, gy)
    _run(launches, k.device)
    return adjoint.contiguous()


def _step_operator(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None = None) -> Tensor:
    _check(TOKEN, w, u, k, v, state, r)
    if k.numel() == 0:
        return k.new_empty(k.shape)
    y, launches = step(w, u, k, v, state, r)
    _run(launches, k.device)
    return y


def _bi_forward_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, checkpoint = arguments
    inputs = BiInputs(*given)
    _check_bi(inputs)
    k = inputs.k
    B, rows, *state = inputs.checkpoint_shape(CHECKPOINT_INTERVAL)
    # Backward starts from its inputs alone.
    checkpoints = _float32(k, B, rows if checkpoint else 0, *state).zero_()
    if k.numel() == 0 or inputs.sequences == 0:
        return k.new_empty(k.shape), checkpoints
    y, launches = bi_forward(widths(_device_limits(k.device)[1])[0], inputs)
    _run(launches, k.device)
    return y, checkpoints


def _bi_backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    *given, checkpoints, gy = arguments
    inputs = BiInputs(*given)
    _check_bi(inputs)
    k = inputs.k
    rows: list[Row] = [
        ("gy", gy, SEQUENCE, k.shape, (k.dtype,)),
        (
            "checkpoints",
            checkpoints,
            ("B", "n", 6, "C"),
            inputs.checkpoint_shape(CHECKPOINT_INTERVAL),
            (torch.float32,),
        ),
    ]
    check_like(k, rows)
    if k.numel() == 0 or inputs.sequences == 0:
        return tuple(torch.zeros_like(x) for x in inputs.gradients(checkpoints))
    results, launches = bi_backward(widths(_device_limits(k.device)[1])[0], inputs, gy)
    _run(launches, k.device)
    return results


def _check_bi(inputs: BiInputs) -> None:
    log_decay, u, k, v, r, cu_seqlens = inputs
    refusal = BACKEND.why_elsewhere(k) or why_unavailable()
    if refusal is not None:
        raise RuntimeError(refusal)
    check(SEQUENCE, log_decay, u, k, v, None, r, cu_seqlens, decay="log_decay")


# Registrations last as long as this object.
_library = torch.library.Library(native.NAMESPACE, "FRAGMENT")


autograd.define(_library, "triton", DEVICE, _forward_operator, _backward_operator, _step_operator)
autograd.define_summaries(_library, "triton", DEVICE, _summary_operator, _adjoint_summary_operator)
autograd.define_bi(_library, "triton_bi", DEVICE, _bi_forward_operator, _bi_backward_operator)
BACKEND = Backend(
    "triton",
    *autograd.attach(_library, "triton", lambda dtype: CHECKPOINT_INTERVAL),
    autograd.attach_bi(_library, "triton_bi", lambda dtype: CHECKPOINT_INTERVAL),
    device_types=(DEVICE,),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    automatic=not INTERPRETED,  # the interpreter is orders of magnitude slower
    why_unavailable=why_unavailable,
)
