"""The Triton kernels: the formulas of csrc/common/math.h, and walks over time that are written in terms of them.

A program is one warp. It owns a tile of neighbouring channels of one sequence over one chunk of its steps and walks
step by step with the sums in registers; rows are loaded several at a time, so that a warp waits once for all of them.
docs/triton.md leads through this file and has the counts behind its choices. Knows nothing of torch.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .plan import CHECKPOINT_INTERVAL, LOADED_STEPS, PARKED_STATES, REPLAYED_STEPS

__all__ = [
    "backward",
    "carry_adjoints",
    "carry_states",
    "forward",
    "reduce",
    "step",
    "summarise_adjoints",
    "summarise_states",
]


def constant(value: float) -> Any:
    """A number that kernels may name; for the interpreter, where numbers are Python's, it is one of those."""
    return value if triton.knobs.runtime.interpret else tl.constexpr(value)


INTERVAL = constant(CHECKPOINT_INTERVAL)
EMPTY_MAX = constant(-1e38)  # finite, because inf - inf is NaN
LOG2E = constant(1.4426950408889634)

# Steps whose rows are loaded together.
LOADED = constant(LOADED_STEPS)
# Steps that backward walks forward and then back with all that they need in registers.
REPLAYED = constant(REPLAYED_STEPS)
PARKED = constant(PARKED_STATES)


def kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled again for other dtypes and constants, never for other sizes, strides or addresses."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[x.name for x in parameters if x.annotation is not tl.constexpr])


# ---- the operator ----


@triton.jit
def key_logit(k):
    # An infinite weight has no finite mean: +inf becomes NaN. -inf stays, a weight of zero.
    k = k.to(tl.float32)
    return tl.where(k == float("inf"), float("nan"), k)


@triton.jit
def log_decay_of(w):
    # Finite for any w but NaN; beyond e^64 a decay is zero whatever the keys are.
    return -tl.exp(tl.where(w > 64.0, 64.0, w))


@triton.jit
def weigh(past_log, present_log):
    # The larger weight is 1, so one exponential serves both.
    gap = past_log - present_log
    lesser = tl.exp2(-tl.abs(gap) * LOG2E)
    past_is_larger = gap >= 0
    return tl.where(past_is_larger, 1.0, lesser), tl.where(past_is_larger, lesser, 1.0)


@triton.jit
def mix(num, den, past, present, v):
    return past * num + present * v, past * den + present


@triton.jit
def advance(num, den, max, log_decay, k, v):
    past, present = weigh(max + log_decay, k)
    num, den = mix(num, den, past, present, v)
    return num, den, tl.maximum(max + log_decay, k)


@triton.jit
def reciprocal(x):
    # Of a positive number. Two instructions on every GPU, where a division takes eight.
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def join(num, den, max, decay, own_num, own_den, own_max):
    past, present = weigh(max + decay, own_max)
    return past * num + present * own_num, past * den + present * own_den, tl.maximum(max + decay, own_max)


# ---- where a program stands, and what it brings from memory ----


@triton.jit
def locate(C_aligned, per_sequence, CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where the program stands: sequence, which of `per_sequence`, channels, and which of them exist.

    Threads behind the last channel repeat channels that exist, so that only stores need a mask.
    """
    tiles = tl.cdiv(C_aligned * ALIGNMENT, CHANNELS)
    row = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C_aligned * ALIGNMENT
    c = tl.minimum(c // ALIGNMENT, C_aligned - 1) * ALIGNMENT + c % ALIGNMENT
    c = tl.max_contiguous(tl.multiple_of(c, ALIGNMENT), ALIGNMENT)
    return (row // per_sequence).to(tl.int64), row % per_sequence, c, exists


@triton.jit
def columns(row, c, ALIGNMENT: tl.constexpr):
    # The host has looked at the addresses; Triton would look again, and compile again, at every call.
    return tl.max_contiguous(tl.multiple_of(row + c, ALIGNMENT), ALIGNMENT)


@triton.jit
def load_parameter(values, c, ALIGNMENT: tl.constexpr):
    return tl.load(columns(values, c, ALIGNMENT)).to(tl.float32)


@triton.jit
def load_rows(rows, stride, STEPS: tl.constexpr):
    loaded = ()
    for i in tl.static_range(STEPS):
        loaded = loaded + (tl.load(rows + i * stride),)
    return loaded


@triton.jit
def load_state(state, C):
    return tl.load(state), tl.load(state + C), tl.load(state + 2 * C)


@triton.jit
def store_state(state, C, num, den, max, exists):
    tl.store(state, num, mask=exists)
    tl.store(state + C, den, mask=exists)
    tl.store(state + 2 * C, max, mask=exists)


@triton.jit
def load_first_state(state, b, C, c, ALIGNMENT: tl.constexpr):
    """The caller's state of sequence b, or the empty one; den == 0 means empty, whatever the other two say."""
    num = tl.zeros(c.shape, tl.float32)
    den = num
    max = num + EMPTY_MAX
    if state is not None:
        given_num, given_den, given_max = load_state(columns(state + b * 3 * C, c, ALIGNMENT), C)
        num = tl.where(given_den == 0, num, given_num)
        max = tl.where(given_den == 0, max, given_max)
        den = given_den
    return num, den, max


# ---- forward ----


@triton.jit
def sum_up(k, v, k_stride, v_stride, log_decay, num, den, max, STEPS: tl.constexpr):
    ks = load_rows(k, k_stride, STEPS)
    vs = load_rows(v, v_stride, STEPS)
    for i in tl.static_range(STEPS):
        num, den, max = advance(num, den, max, log_decay, key_logit(ks[i]), vs[i].to(tl.float32))
    return num, den, max


@triton.jit
def walk(k, v, y, k_stride, v_stride, C, log_decay, u, num, den, max, exists, STEPS: tl.constexpr):
    ks = load_rows(k, k_stride, STEPS)
    vs = load_rows(v, v_stride, STEPS)
    for i in tl.static_range(STEPS):
        kt, vt = key_logit(ks[i]), vs[i].to(tl.float32)
        past, present = weigh(max, u + kt)
        y_num, y_den = mix(num, den, past, present, vt)
        tl.store(y + i * C, (y_num * reciprocal(y_den)).to(y.dtype.element_ty), mask=exists)
        num, den, max = advance(num, den, max, log_decay, kt, vt)
    return num, den, max


@kernel
def summarise_states(
    w, k, v, state, states,
    k_batch_stride: tl.int64, k_time_stride: tl.int64, v_batch_stride: tl.int64, v_time_stride: tl.int64,
    C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32, rows: tl.int32, rows_per_chunk: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """What every chunk but the last sums up to, alone, or the first one from the given state."""
    b, chunk, c, exists = locate(C_aligned, chunks - 1, CHANNELS, ALIGNMENT)
    C = C_aligned.to(tl.int64) * ALIGNMENT
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    num, den, max = load_first_state(None, b, C, c, ALIGNMENT)
    if chunk == 0:
        num, den, max = load_first_state(state, b, C, c, ALIGNMENT)
    k_time_stride *= ALIGNMENT
    v_time_stride *= ALIGNMENT
    k = columns(k + b * k_batch_stride * ALIGNMENT, c, ALIGNMENT)
    v = columns(v + b * v_batch_stride * ALIGNMENT, c, ALIGNMENT)
    for i in range(0, chunk_len, LOADED):
        t = chunk * chunk_len + i
        num, den, max = sum_up(
            k + t * k_time_stride, v + t * v_time_stride, k_time_stride, v_time_stride, log_decay, num, den, max, LOADED
        )
    after = b * rows + (chunk + 1) * rows_per_chunk - 1
    store_state(columns(states + after * 3 * C, c, ALIGNMENT), C, num, den, max, exists)


@triton.jit
def carry_state(slots, stride, C, decay, num, den, max, exists, SLOTS: tl.constexpr):
    own = ()
    for i in tl.static_range(SLOTS):
        own = own + (load_state(slots + i * stride, C),)
    for i in tl.static_range(SLOTS):
        num, den, max = join(num, den, max, decay, own[i][0], own[i][1], own[i][2])
        store_state(slots + i * stride, C, num, den, max, exists)
    return num, den, max


@kernel
def carry_states(
    w, states, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32, rows: tl.int32, rows_per_chunk: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Joins the sums of the chunks in order, in place: each becomes the state after its chunk."""
    b, _, c, exists = locate(C_aligned, 1, CHANNELS, ALIGNMENT)
    C = C_aligned.to(tl.int64) * ALIGNMENT
    decay = chunk_len * log_decay_of(load_parameter(w, c, ALIGNMENT))
    stride = rows_per_chunk * 3 * C
    first = columns(states + (b * rows + rows_per_chunk - 1) * 3 * C, c, ALIGNMENT)
    num, den, max = load_state(first, C)
    whole = chunks - 1 - (chunks - 2) % LOADED
    for chunk in range(1, whole, LOADED):
        num, den, max = carry_state(first + chunk * stride, stride, C, decay, num, den, max, exists, LOADED)
    for chunk in range(whole, chunks - 1):
        num, den, max = carry_state(first + chunk * stride, stride, C, decay, num, den, max, exists, 1)


@kernel
def forward(
    w, u, k, v, state, states, y, state_out, checkpoints,
    k_batch_stride: tl.int64, k_time_stride: tl.int64, v_batch_stride: tl.int64, v_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32, rows: tl.int32, rows_per_chunk: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """y, the checkpoints within every chunk, and the state after the last one."""
    b, chunk, c, exists = locate(C_aligned, chunks, CHANNELS, ALIGNMENT)
    C = C_aligned.to(tl.int64) * ALIGNMENT
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    num, den, max = load_first_state(state, b, C, c, ALIGNMENT)
    if chunk > 0:
        before = b * rows + chunk * rows_per_chunk - 1
        num, den, max = load_state(columns(states + before * 3 * C, c, ALIGNMENT), C)
    k_time_stride *= ALIGNMENT
    v_time_stride *= ALIGNMENT
    k = columns(k + b * k_batch_stride * ALIGNMENT, c, ALIGNMENT)
    v = columns(v + b * v_batch_stride * ALIGNMENT, c, ALIGNMENT)
    y = columns(y + b * T * C, c, ALIGNMENT)
    if checkpoints is not None:
        checkpoints = columns(checkpoints + b * tl.cdiv(T, INTERVAL) * 3 * C, c, ALIGNMENT)
    begin = chunk * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    whole = end - (end - begin) % LOADED
    for t in range(begin, whole, LOADED):
        if checkpoints is not None:
            if (t % INTERVAL == 0) & (t > begin):
                store_state(checkpoints + (t // INTERVAL - 1) * 3 * C, C, num, den, max, exists)
        num, den, max = walk(
            k + t * k_time_stride, v + t * v_time_stride, y + t * C, k_time_stride, v_time_stride, C,
            log_decay, u, num, den, max, exists, LOADED,
        )  # fmt: skip
    for t in range(whole, end):
        if checkpoints is not None:
            if (t % INTERVAL == 0) & (t > begin):
                store_state(checkpoints + (t // INTERVAL - 1) * 3 * C, C, num, den, max, exists)
        num, den, max = walk(
            k + t * k_time_stride, v + t * v_time_stride, y + t * C, k_time_stride, v_time_stride, C,
            log_decay, u, num, den, max, exists, 1,
        )  # fmt: skip
    if chunk == chunks - 1:
        store_state(columns(state_out + b * 3 * C, c, ALIGNMENT), C, num, den, max, exists)
        if checkpoints is not None:
            store_state(checkpoints + (tl.cdiv(T, INTERVAL) - 1) * 3 * C, C, num, den, max, exists)


# ---- backward ----
#
# The gradient of a state's (num, den) is relative to that state's max, so whoever passes it on passes the max as well.


@triton.jit
def load_adjoint(row, C, c, ALIGNMENT: tl.constexpr):
    row = columns(row, c, ALIGNMENT)
    return tl.load(row), tl.load(row + C)


@triton.jit
def sum_up_adjoint(
    k, v, gy, k_stride, v_stride, gy_stride, log_decay, u, num, den, max, passed, gnum, gden, STEPS: tl.constexpr
):
    # The adjoint's recurrence runs backward, but as a sum it can be taken forward: what a step gives to the state
    # before the chunk is what it gives to the state before itself, times all weights of the past up to there, `passed`.
    ks = load_rows(k, k_stride, STEPS)
    vs = load_rows(v, v_stride, STEPS)
    gs = load_rows(gy, gy_stride, STEPS)
    for i in tl.static_range(STEPS):
        kt, vt = key_logit(ks[i]), vs[i].to(tl.float32)
        past, present = weigh(max, u + kt)
        y_num, y_den = mix(num, den, past, present, vt)
        inverse = reciprocal(y_den)
        h = passed * past * (gs[i].to(tl.float32) * inverse)
        gnum += h
        gden -= h * (y_num * inverse)
        past, present = weigh(max + log_decay, kt)
        passed *= past
        num, den = mix(num, den, past, present, vt)
        max = tl.maximum(max + log_decay, kt)
    return num, den, max, passed, gnum, gden


@triton.jit
def replay_and_reverse(
    k, v, gy, gk, gv, k_stride, v_stride, gy_stride, C, log_decay, u, num, den, max, gnum, gden,
    g_log_decay, gu, exists, STEPS: tl.constexpr,
):  # fmt: skip
    """Forward from the state before some steps, and back from the gradient of the one after them."""
    ks = load_rows(k, k_stride, STEPS)
    vs = load_rows(v, v_stride, STEPS)
    gs = load_rows(gy, gy_stride, STEPS)
    replayed = ()
    for i in tl.static_range(STEPS):
        kt, vt = key_logit(ks[i]), vs[i].to(tl.float32)
        reads = weigh(max, u + kt)
        advances = weigh(max + log_decay, kt)
        replayed = replayed + ((num, den, reads, advances),)
        num, den = mix(num, den, advances[0], advances[1], vt)
        max = tl.maximum(max + log_decay, kt)
    for i in tl.static_range(STEPS - 1, -1, -1):
        num, den, reads, advances = replayed[i]
        vt = vs[i].to(tl.float32)

        y_num, y_den = mix(num, den, reads[0], reads[1], vt)
        inverse = reciprocal(y_den)
        y = y_num * inverse
        h = gs[i].to(tl.float32) * inverse
        h_present = reads[1] * h
        gu_t = h_present * (vt - y)
        gu += gu_t

        gv_t = advances[1] * gnum + h_present
        gk_t = advances[1] * (vt * gnum + gden) + gu_t
        tl.store(gv + i * C, gv_t.to(gv.dtype.element_ty), mask=exists)
        tl.store(gk + i * C, gk_t.to(gk.dtype.element_ty), mask=exists)

        # Paired step by step: recovering it from sums of gk is exact on paper and noise in float32 (docs/wkv.md).
        gnum *= advances[0]
        gden *= advances[0]
        g_log_decay += num * gnum + den * gden

        h_past = reads[0] * h
        gnum += h_past
        gden -= h_past * y
    return gnum, gden, g_log_decay, gu


@kernel
def summarise_adjoints(
    w, u, k, v, gy, checkpoints, gstate_out, chunk_adjoints,
    k_batch_stride: tl.int64, k_time_stride: tl.int64, v_batch_stride: tl.int64, v_time_stride: tl.int64,
    gy_batch_stride: tl.int64, gy_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """What every chunk but the first gives to the state before it, alone, or the last one with what follows it."""
    b, slot, c, exists = locate(C_aligned, chunks - 1, CHANNELS, ALIGNMENT)
    C = C_aligned.to(tl.int64) * ALIGNMENT
    begin = (slot + 1) * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    checkpoints = columns(checkpoints + b * tl.cdiv(T, INTERVAL) * 3 * C, c, ALIGNMENT)
    num, den, max = load_state(checkpoints + (begin // INTERVAL - 1) * 3 * C, C)
    gnum = tl.zeros(c.shape, tl.float32)
    gden = gnum
    if gstate_out is not None:
        if slot == chunks - 2:
            last_max = tl.load(checkpoints + ((tl.cdiv(T, INTERVAL) - 1) * 3 + 2) * C)
            factor = tl.exp2((max + (end - begin) * log_decay - last_max) * LOG2E)
            gnum, gden = load_adjoint(gstate_out + b * 3 * C, C, c, ALIGNMENT)
            gnum *= factor
            gden *= factor
    k_time_stride *= ALIGNMENT
    v_time_stride *= ALIGNMENT
    gy_time_stride *= ALIGNMENT
    k = columns(k + b * k_batch_stride * ALIGNMENT, c, ALIGNMENT)
    v = columns(v + b * v_batch_stride * ALIGNMENT, c, ALIGNMENT)
    gy = columns(gy + b * gy_batch_stride * ALIGNMENT, c, ALIGNMENT)
    passed = tl.full(c.shape, 1.0, tl.float32)
    whole = end - (end - begin) % LOADED
    for t in range(begin, whole, LOADED):
        num, den, max, passed, gnum, gden = sum_up_adjoint(
            k + t * k_time_stride, v + t * v_time_stride, gy + t * gy_time_stride,
            k_time_stride, v_time_stride, gy_time_stride, log_decay, u, num, den, max, passed, gnum, gden, LOADED,
        )  # fmt: skip
    for t in range(whole, end):
        num, den, max, passed, gnum, gden = sum_up_adjoint(
            k + t * k_time_stride, v + t * v_time_stride, gy + t * gy_time_stride,
            k_time_stride, v_time_stride, gy_time_stride, log_decay, u, num, den, max, passed, gnum, gden, 1,
        )  # fmt: skip
    chunk_adjoints = columns(chunk_adjoints + (b * (chunks - 1) + slot) * 2 * C, c, ALIGNMENT)
    tl.store(chunk_adjoints, gnum, mask=exists)
    tl.store(chunk_adjoints + C, gden, mask=exists)


@triton.jit
def carry_adjoint(slots, maxes, last, C, stride, decay, gnum, gden, exists, SLOTS: tl.constexpr):
    # From slot `last` + 1 to SLOTS slots before it.
    own = ()
    for i in tl.static_range(SLOTS):
        slot = slots + (last - i) * 2 * C
        change = tl.load(maxes + (last - i) * stride) - tl.load(maxes + (last - i + 1) * stride)
        own = own + ((tl.load(slot), tl.load(slot + C), tl.exp2((decay + change) * LOG2E)),)
    for i in tl.static_range(SLOTS):
        slot = slots + (last - i) * 2 * C
        gnum = own[i][0] + own[i][2] * gnum
        gden = own[i][1] + own[i][2] * gden
        tl.store(slot, gnum, mask=exists)
        tl.store(slot + C, gden, mask=exists)
    return gnum, gden


@kernel
def carry_adjoints(
    w, checkpoints, chunk_adjoints, T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Joins what the chunks give from the last to the first, in place: slot i becomes the gradient after chunk i."""
    b, _, c, exists = locate(C_aligned, 1, CHANNELS, ALIGNMENT)
    C = C_aligned.to(tl.int64) * ALIGNMENT
    decay = chunk_len * log_decay_of(load_parameter(w, c, ALIGNMENT))
    # The max of the state after chunk i lies at maxes + i * stride.
    stride = chunk_len // INTERVAL * 3 * C
    maxes = columns(checkpoints + b * tl.cdiv(T, INTERVAL) * 3 * C, c, ALIGNMENT) + stride - C
    slots = columns(chunk_adjoints + b * (chunks - 1) * 2 * C, c, ALIGNMENT)
    # The last slot is true already.
    gnum, gden = load_adjoint(chunk_adjoints + ((b + 1) * (chunks - 1) - 1) * 2 * C, C, c, ALIGNMENT)
    left_over = (chunks - 2) % LOADED
    for passed in range(0, chunks - 2 - left_over, LOADED):
        gnum, gden = carry_adjoint(slots, maxes, chunks - 3 - passed, C, stride, decay, gnum, gden, exists, LOADED)
    for passed in range(left_over):
        gnum, gden = carry_adjoint(slots, maxes, left_over - 1 - passed, C, stride, decay, gnum, gden, exists, 1)


@kernel
def backward(
    w, u, k, v, gy, state, checkpoints, gstate_out, chunk_adjoints, parked, gk, gv, gstate, partials,
    k_batch_stride: tl.int64, k_time_stride: tl.int64, v_batch_stride: tl.int64, v_time_stride: tl.int64,
    gy_batch_stride: tl.int64, gy_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """gk, gv, the gradient of the first state, and each chunk's part of the gradients of log_decay and u.

    Takes the chunk interval by interval, from the last to the first. It walks one forward from its checkpoint and parks
    the state before every few steps in memory of its own; then it takes these few steps, from the last to the first,
    forward once more and back.
    """
    b, chunk, c, exists = locate(C_aligned, chunks, CHANNELS, ALIGNMENT)
    C = C_aligned.to(tl.int64) * ALIGNMENT
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    begin = chunk * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    checkpoints = columns(checkpoints + b * tl.cdiv(T, INTERVAL) * 3 * C, c, ALIGNMENT)
    gnum = tl.zeros(c.shape, tl.float32)
    gden = gnum
    if chunk < chunks - 1:
        gnum, gden = load_adjoint(chunk_adjoints + (b * (chunks - 1) + chunk) * 2 * C, C, c, ALIGNMENT)
    elif gstate_out is not None:
        gnum, gden = load_adjoint(gstate_out + b * 3 * C, C, c, ALIGNMENT)
    g_log_decay = tl.zeros(c.shape, tl.float32)
    gu = g_log_decay

    k_time_stride *= ALIGNMENT
    v_time_stride *= ALIGNMENT
    gy_time_stride *= ALIGNMENT
    k = columns(k + b * k_batch_stride * ALIGNMENT, c, ALIGNMENT)
    v = columns(v + b * v_batch_stride * ALIGNMENT, c, ALIGNMENT)
    gy = columns(gy + b * gy_batch_stride * ALIGNMENT, c, ALIGNMENT)
    gk = columns(gk + b * T * C, c, ALIGNMENT)
    gv = columns(gv + b * T * C, c, ALIGNMENT)
    parked += tl.program_id(0).to(tl.int64) * (PARKED * 3 * CHANNELS)
    parked = tl.max_contiguous(tl.multiple_of(parked + tl.arange(0, CHANNELS), 16), 16)
    own = tl.full(c.shape, 1, tl.int1)

    intervals = tl.cdiv(end - begin, INTERVAL)
    for behind in range(intervals):
        t_first = begin + (intervals - 1 - behind) * INTERVAL
        steps = tl.minimum(end - t_first, INTERVAL)
        left_over = steps % LOADED
        whole = t_first + steps - left_over
        num, den, max = load_first_state(state, b, C, c, ALIGNMENT)
        if t_first > 0:
            num, den, max = load_state(checkpoints + (t_first // INTERVAL - 1) * 3 * C, C)

        slot = parked
        for t in range(t_first, whole, LOADED):
            for part in tl.static_range(LOADED // REPLAYED):
                store_state(slot, CHANNELS, num, den, max, own)
                slot += 3 * CHANNELS
                t_part = t + part * REPLAYED
                num, den, max = sum_up(
                    k + t_part * k_time_stride, v + t_part * v_time_stride, k_time_stride, v_time_stride,
                    log_decay, num, den, max, REPLAYED,
                )  # fmt: skip
        for t in range(whole, whole + left_over):
            store_state(slot, CHANNELS, num, den, max, own)
            slot += 3 * CHANNELS
            num, den, max = sum_up(
                k + t * k_time_stride, v + t * v_time_stride, k_time_stride, v_time_stride, log_decay, num, den, max, 1
            )
        # Triton may give a channel's store and load to two threads.
        tl.debug_barrier()

        # The next checkpoint may have been joined, and not walked to: the same state in another gauge.
        max_after = tl.load(checkpoints + (t_first // INTERVAL * 3 + 2) * C)
        change = tl.exp2((max - max_after) * LOG2E)
        gnum *= change
        gden *= change
        for i in range(left_over):
            t = whole + left_over - 1 - i
            slot -= 3 * CHANNELS
            num, den, max = load_state(slot, CHANNELS)
            gnum, gden, g_log_decay, gu = replay_and_reverse(
                k + t * k_time_stride, v + t * v_time_stride, gy + t * gy_time_stride, gk + t * C, gv + t * C,
                k_time_stride, v_time_stride, gy_time_stride, C, log_decay, u, num, den, max,
                gnum, gden, g_log_decay, gu, exists, 1,
            )  # fmt: skip
        for i in range(REPLAYED, whole - t_first + 1, REPLAYED):
            t = whole - i
            slot -= 3 * CHANNELS
            num, den, max = load_state(slot, CHANNELS)
            gnum, gden, g_log_decay, gu = replay_and_reverse(
                k + t * k_time_stride, v + t * v_time_stride, gy + t * gy_time_stride, gk + t * C, gv + t * C,
                k_time_stride, v_time_stride, gy_time_stride, C, log_decay, u, num, den, max,
                gnum, gden, g_log_decay, gu, exists, REPLAYED,
            )  # fmt: skip
        tl.debug_barrier()

    partials = columns(partials + (b * chunks + chunk) * 2 * C, c, ALIGNMENT)
    tl.store(partials, g_log_decay, mask=exists)
    tl.store(partials + C, gu, mask=exists)
    if chunk == 0:
        # The gradient of max follows from the others for consumers that respect the state's gauge.
        num, den, max = load_first_state(state, b, C, c, ALIGNMENT)
        of_first = columns(gstate + b * 3 * C, c, ALIGNMENT)
        store_state(of_first, C, gnum, gden, num * gnum + den * gden, exists)


@kernel
def reduce(w, partials, gw, gu, C: tl.int32, rows: tl.int32, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Sums the partial gradients over all rows, in an order that depends on their number alone."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    first = tl.arange(0, ROWS)
    g_log_decay = tl.zeros([ROWS, CHANNELS], tl.float32)
    g_u = g_log_decay
    for start in range(0, rows, ROWS):
        row = start + first
        at = partials + row.to(tl.int64)[:, None] * (2 * C) + c[None, :]
        inside = (row < rows)[:, None] & exists[None, :]
        g_log_decay += tl.load(at, mask=inside, other=0.0)
        g_u += tl.load(at + C, mask=inside, other=0.0)
    # The log-decay -exp(w) is its own derivative.
    log_decay = log_decay_of(tl.load(w + c, mask=exists, other=0.0).to(tl.float32))
    tl.store(gw + c, (tl.sum(g_log_decay, 0) * log_decay).to(gw.dtype.element_ty), mask=exists)
    tl.store(gu + c, tl.sum(g_u, 0).to(gu.dtype.element_ty), mask=exists)


# ---- one token ----


@kernel
def step(
    w, u, k, v, r, state, y, k_stride: tl.int64, v_stride: tl.int64, r_stride: tl.int64,
    state_batch_stride: tl.int64, state_row_stride: tl.int64, state_channel_stride: tl.int64,
    C: tl.int32, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of one token, gated where there is an r, and the state in place."""
    b, _, c, exists = locate(C, 1, CHANNELS, 1)
    log_decay = log_decay_of(load_parameter(w, c, 1))
    kt = key_logit(tl.load(k + b * k_stride + c))
    vt = tl.load(v + b * v_stride + c).to(tl.float32)
    state += b * state_batch_stride + c * state_channel_stride
    num, den, max = load_state(state, state_row_stride)
    max = tl.where(den == 0, EMPTY_MAX, max)
    num = tl.where(den == 0, 0.0, num)
    past, present = weigh(max, load_parameter(u, c, 1) + kt)
    y_num, y_den = mix(num, den, past, present, vt)
    yt = y_num * reciprocal(y_den)
    if r is not None:
        yt *= tl.sigmoid(tl.load(r + b * r_stride + c).to(tl.float32))
    tl.store(y + b * C + c, yt.to(y.dtype.element_ty), mask=exists)
    num, den, max = advance(num, den, max, log_decay, kt, vt)
    store_state(state, state_row_stride, num, den, max, exists)
