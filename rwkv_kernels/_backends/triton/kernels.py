"""The Triton kernels: the formulas of csrc/common/math.h, and the recurrence over time in terms of them.

A program is one warp. It owns a tile of neighbouring channels of one sequence over one chunk of its steps and takes
them one by one with the sums in registers; rows are loaded several at a time, so that a warp waits once for them.
docs/triton.md leads through this file and has the counts behind its choices.

A state is the tuple (num, den, max), its adjoint (gnum, gden): the gradients of num and den relative to that max, which
whoever passes an adjoint on passes as well. A sequence is the tuple of the address of its step 0 and the stride of a
step.

Tensors that a call may lack are None, a constant to Triton: kernels without a gate or without cu_seqlens have no code
for them. With cu_seqlens, k is one row of steps, and the chunks of its sequences lie one after the other: sequence n
has those from cu_seqlens[n] // chunk_len + n on, which never overlap. T and chunks are first those of the row.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ... import reference
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
EMPTY_MAX = constant(reference.EMPTY_MAX)
LOG2E = constant(1.4426950408889634)

# Steps whose rows are loaded together.
LOADED = constant(LOADED_STEPS)
# Steps that backward takes forward and then back with all that they need in registers.
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
def mix(state, weights, v):
    past, present = weights
    return past * state[0] + present * v, past * state[1] + present


@triton.jit
def advance(state, log_decay, k, v):
    num, den = mix(state, weigh(state[2] + log_decay, k), v)
    return num, den, tl.maximum(state[2] + log_decay, k)


@triton.jit
def reciprocal(x):
    # Of a positive number. Two instructions on every GPU, where a division takes eight.
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def gate_of(r):
    """s and e of sigmoid(r) = s / (1 + e), which has the derivative e / (1 + e)²; neither is larger than 1."""
    r = r.to(tl.float32)
    e = tl.exp2(-tl.abs(r) * LOG2E)
    return tl.where(r >= 0, 1.0, e), e


@triton.jit
def join(state, decay, own):
    past, present = weigh(state[2] + decay, own[2])
    joined_max = tl.maximum(state[2] + decay, own[2])
    return past * state[0] + present * own[0], past * state[1] + present * own[1], joined_max


# ---- where a program stands, and what it loads and stores ----


@triton.jit
def locate(C_aligned, per_sequence, CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The program's sequence, which of `per_sequence` it is, C, its channels, and which of them exist.

    Threads behind the last channel repeat channels that exist, so that only stores need a mask.
    """
    tiles = tl.cdiv(C_aligned * ALIGNMENT, CHANNELS)
    row = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C_aligned * ALIGNMENT
    c = tl.minimum(c // ALIGNMENT, C_aligned - 1) * ALIGNMENT + c % ALIGNMENT
    c = tl.max_contiguous(tl.multiple_of(c, ALIGNMENT), ALIGNMENT)
    return row // per_sequence, row % per_sequence, C_aligned.to(tl.int64) * ALIGNMENT, c, exists


@triton.jit
def boundary(cu_seqlens, n, T):
    # Within k whatever cu_seqlens has, so that no address is outside of any tensor.
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), T).to(tl.int32)


@triton.jit
def steps_of(cu_seqlens, n, T):
    """The first step of sequence n in k's row, and the number of its steps."""
    first = boundary(cu_seqlens, n, T)
    return first.to(tl.int64), tl.maximum(boundary(cu_seqlens, n + 1, T) - first, 0)


@triton.jit
def owner(cu_seqlens, i, T, chunk_len, chunks, EACH: tl.constexpr):
    """The last sequence n with cu_seqlens[n] // chunk_len + n * EACH <= i, and i relative to that."""
    n = tl.full([], 0, tl.int32)
    beyond = chunks - T // chunk_len  # the number of sequences: chunks are T // chunk_len and one for each
    while beyond - n > 1:
        middle = (n + beyond) // 2
        is_before = boundary(cu_seqlens, middle, T) // chunk_len + middle * EACH <= i
        n = tl.where(is_before, middle, n)
        beyond = tl.where(is_before, beyond, middle)
    return n, i - (boundary(cu_seqlens, n, T) // chunk_len + n * EACH)


@triton.jit
def place(cu_seqlens, b, chunk, T, chunk_len, chunks, EACH: tl.constexpr):
    """The sequence's number, where it starts in k's batch and in a contiguous tensor's steps, its T, chunk and chunks.

    A chunk index that no sequence has becomes `chunks`. Sequences have EACH more indices than whole chunks fit: 1 for
    all their chunks, of which a sequence without steps has one, 0 for all but one of them.
    """
    if cu_seqlens is None:
        n = b.to(tl.int64)
        found = (n, n, n * T, T, chunk, chunks)
    else:
        n, chunk = owner(cu_seqlens, chunk, T, chunk_len, chunks, EACH)
        first, steps = steps_of(cu_seqlens, n, T)
        chunks = tl.maximum(tl.cdiv(steps, chunk_len), 1)
        chunk = tl.where((chunk >= 0) & (chunk < chunks - 1 + EACH), chunk, chunks)
        found = (n.to(tl.int64), first, first, steps, chunk, chunks)
    return found


@triton.jit
def cuts_of(cu_seqlens, T, chunk_len, chunks):
    """The indices of a row's chunks that are not their sequence's last."""
    if cu_seqlens is None:  # noqa: SIM108 - a ternary is typed otherwise
        cuts = chunks - 1
    else:
        cuts = T // chunk_len
    return cuts


@triton.jit
def columns(row, c, ALIGNMENT: tl.constexpr):
    # The host has looked at the addresses; Triton would look again, and compile again, at every call.
    return tl.max_contiguous(tl.multiple_of(row + c, ALIGNMENT), ALIGNMENT)


@triton.jit
def sequence(x, start, start_stride, time_stride, c, ALIGNMENT: tl.constexpr):
    # Sequences start at an element of the batch, packed ones at a step.
    return columns(x + start * start_stride * ALIGNMENT, c, ALIGNMENT), time_stride * ALIGNMENT


@triton.jit
def load_parameter(values, c, ALIGNMENT: tl.constexpr):
    return tl.load(columns(values, c, ALIGNMENT)).to(tl.float32)


@triton.jit
def load_rows(x, t, STEPS: tl.constexpr):
    rows, stride = x
    rows += t * stride
    loaded = ()
    for i in tl.static_range(STEPS):
        loaded = loaded + (tl.load(rows + i * stride),)
    return loaded


@triton.jit
def load_state(state, C):
    return tl.load(state), tl.load(state + C), tl.load(state + 2 * C)


@triton.jit
def store_state(place, C, state, exists):
    for i in tl.static_range(3):
        tl.store(place + i * C, state[i], mask=exists)


@triton.jit
def load_adjoint(row, C, c, ALIGNMENT: tl.constexpr):
    row = columns(row, c, ALIGNMENT)
    return tl.load(row), tl.load(row + C)


@triton.jit
def store_pair(row, C, c, pair, exists, ALIGNMENT: tl.constexpr):
    row = columns(row, c, ALIGNMENT)
    tl.store(row, pair[0], mask=exists)
    tl.store(row + C, pair[1], mask=exists)


@triton.jit
def normal(state):
    # den == 0 means empty, whatever the other two say.
    num, den, max = state
    return tl.where(den == 0, 0.0, num), den, tl.where(den == 0, EMPTY_MAX, max)


@triton.jit
def load_first_state(state, b, C, c, ALIGNMENT: tl.constexpr):
    """The caller's state of sequence b, or the empty one."""
    zero = tl.zeros(c.shape, tl.float32)
    first = (zero, zero, zero + EMPTY_MAX)
    if state is not None:
        first = normal(load_state(columns(state + b * 3 * C, c, ALIGNMENT), C))
    return first


@triton.jit
def checkpoints_of(checkpoints, cu_seqlens, n, first, T, C, c, ALIGNMENT: tl.constexpr):
    """The checkpoints of sequence n, which starts at step `first` of k's row if it is packed."""
    if cu_seqlens is None:  # noqa: SIM108 - a ternary is typed otherwise
        row = n * tl.cdiv(T, INTERVAL)
    else:
        row = first // INTERVAL + n
    return columns(checkpoints + row * 3 * C, c, ALIGNMENT)


@triton.jit
def states_of(cu_seqlens, n, first, chunk_len, rows, rows_per_chunk):
    """The row of sequence n in `states`, of `rows` for an element of the batch and rows_per_chunk for a chunk."""
    if cu_seqlens is None:  # noqa: SIM108 - a ternary is typed otherwise
        row = n * rows
    else:
        row = first // (chunk_len // rows_per_chunk) + n
    return row


@triton.jit
def adjoints_of(cu_seqlens, n, first, chunk_len, chunks):
    """The row of sequence n in the adjoints between chunks."""
    if cu_seqlens is None:  # noqa: SIM108 - a ternary is typed otherwise
        row = n * (chunks - 1)
    else:
        row = first // chunk_len
    return row


# ---- forward ----


@triton.jit
def advance_steps(k, v, t, log_decay, state, STEPS: tl.constexpr):
    ks = load_rows(k, t, STEPS)
    vs = load_rows(v, t, STEPS)
    for i in tl.static_range(STEPS):
        state = advance(state, log_decay, key_logit(ks[i]), vs[i].to(tl.float32))
    return state


@triton.jit
def forward_steps(k, v, r, y, checkpoints, t, begin, C, log_decay, u, state, exists, STEPS: tl.constexpr):
    if checkpoints is not None:
        if (t % INTERVAL == 0) & (t > begin):
            store_state(checkpoints + (t // INTERVAL - 1) * 3 * C, C, state, exists)
    ks = load_rows(k, t, STEPS)
    vs = load_rows(v, t, STEPS)
    if r is not None:
        rs = load_rows(r, t, STEPS)
    y += t * C
    for i in tl.static_range(STEPS):
        kt, vt = key_logit(ks[i]), vs[i].to(tl.float32)
        y_num, y_den = mix(state, weigh(state[2], u + kt), vt)
        if r is None:
            yt = y_num * reciprocal(y_den)
        else:
            s, e = gate_of(rs[i])
            yt = y_num * reciprocal(y_den * (1 + e)) * s
        tl.store(y + i * C, yt.to(y.dtype.element_ty), mask=exists)
        state = advance(state, log_decay, kt, vt)
    return state


@kernel
def summarise_states(
    w, k, v, state, cu_seqlens, states,
    k_start_stride: tl.int64, k_time_stride: tl.int64, v_start_stride: tl.int64, v_time_stride: tl.int64,
    C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32, rows: tl.int32, rows_per_chunk: tl.int32, T: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The state after every chunk but a sequence's last, each from empty, the first one from the given state.

    Or after ALL chunks, of sequences that are not packed.
    """
    cuts = chunks if ALL else cuts_of(cu_seqlens, T, chunk_len, chunks)
    b, chunk, C, c, exists = locate(C_aligned, cuts, CHANNELS, ALIGNMENT)
    n, start, first, T, chunk, chunks = place(cu_seqlens, b, chunk, T, chunk_len, chunks, 0)
    if cu_seqlens is not None:
        if chunk == chunks:
            return
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    own = load_first_state(None, n, C, c, ALIGNMENT)
    if chunk == 0:
        own = load_first_state(state, n, C, c, ALIGNMENT)
    k = sequence(k, start, k_start_stride, k_time_stride, c, ALIGNMENT)
    v = sequence(v, start, v_start_stride, v_time_stride, c, ALIGNMENT)
    steps = chunk_len
    left_over = 0
    if ALL:
        steps = tl.minimum(T - chunk * chunk_len, chunk_len)
        left_over = steps % LOADED
    for i in range(0, steps - left_over, LOADED):
        own = advance_steps(k, v, chunk * chunk_len + i, log_decay, own, LOADED)
    after = states_of(cu_seqlens, n, first, chunk_len, rows, rows_per_chunk) + (chunk + 1) * rows_per_chunk - 1
    if ALL:
        for i in range(steps - left_over, steps):
            own = advance_steps(k, v, chunk * chunk_len + i, log_decay, own, 1)
    store_state(columns(states + after * 3 * C, c, ALIGNMENT), C, own, exists)


@triton.jit
def carry_state(slots, stride, C, decay, state, exists, SLOTS: tl.constexpr):
    own = ()
    for i in tl.static_range(SLOTS):
        own = own + (load_state(slots + i * stride, C),)
    for i in tl.static_range(SLOTS):
        state = join(state, decay, own[i])
        store_state(slots + i * stride, C, state, exists)
    return state


@kernel
def carry_states(
    w, cu_seqlens, states,
    C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32, rows: tl.int32, rows_per_chunk: tl.int32, T: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Joins the states of a sequence's chunks in order, in place: each becomes the true state after its chunk.

    But for the last, or of ALL chunks.
    """
    n, _, C, c, exists = locate(C_aligned, 1, CHANNELS, ALIGNMENT)
    n = n.to(tl.int64)
    first = n
    if cu_seqlens is not None:
        first, T = steps_of(cu_seqlens, n, T)
        chunks = tl.cdiv(T, chunk_len)
        if chunks < 3:
            return
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    decay = chunk_len * log_decay
    stride = rows_per_chunk * 3 * C
    after_first = states_of(cu_seqlens, n, first, chunk_len, rows, rows_per_chunk) + rows_per_chunk - 1
    slots = columns(states + after_first * 3 * C, c, ALIGNMENT)
    state = load_state(slots, C)
    whole = chunks - 1 - (chunks - 2) % LOADED
    for chunk in range(1, whole, LOADED):
        state = carry_state(slots + chunk * stride, stride, C, decay, state, exists, LOADED)
    for chunk in range(whole, chunks - 1):
        state = carry_state(slots + chunk * stride, stride, C, decay, state, exists, 1)
    if ALL:
        last_decay = (T - (chunks - 1) * chunk_len) * log_decay
        carry_state(slots + (chunks - 1) * stride, stride, C, last_decay, state, exists, 1)


@kernel
def forward(
    w, u, k, v, state, r, cu_seqlens, states, y, state_out, checkpoints,
    k_start_stride: tl.int64, k_time_stride: tl.int64, v_start_stride: tl.int64, v_time_stride: tl.int64,
    r_start_stride: tl.int64, r_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32, rows: tl.int32, rows_per_chunk: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """y, gated where there is an r, the checkpoints within every chunk, and the state after a sequence's last one."""
    b, chunk, C, c, exists = locate(C_aligned, chunks, CHANNELS, ALIGNMENT)
    n, start, first, T, chunk, chunks = place(cu_seqlens, b, chunk, T, chunk_len, chunks, 1)
    if cu_seqlens is not None:
        if chunk == chunks:
            return
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    running = load_first_state(state, n, C, c, ALIGNMENT)
    if chunk > 0:
        before = states_of(cu_seqlens, n, first, chunk_len, rows, rows_per_chunk) + chunk * rows_per_chunk - 1
        running = load_state(columns(states + before * 3 * C, c, ALIGNMENT), C)
    k = sequence(k, start, k_start_stride, k_time_stride, c, ALIGNMENT)
    v = sequence(v, start, v_start_stride, v_time_stride, c, ALIGNMENT)
    if r is not None:
        r = sequence(r, start, r_start_stride, r_time_stride, c, ALIGNMENT)
    y = columns(y + first * C, c, ALIGNMENT)
    if checkpoints is not None:
        checkpoints = checkpoints_of(checkpoints, cu_seqlens, n, first, T, C, c, ALIGNMENT)
    begin = chunk * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    whole = end - (end - begin) % LOADED
    for t in range(begin, whole, LOADED):
        running = forward_steps(k, v, r, y, checkpoints, t, begin, C, log_decay, u, running, exists, LOADED)
    for t in range(whole, end):
        running = forward_steps(k, v, r, y, checkpoints, t, begin, C, log_decay, u, running, exists, 1)
    if chunk == chunks - 1:
        store_state(columns(state_out + n * 3 * C, c, ALIGNMENT), C, running, exists)
        if checkpoints is not None:
            if cu_seqlens is None or T > 0:
                store_state(checkpoints + (tl.cdiv(T, INTERVAL) - 1) * 3 * C, C, running, exists)


# ---- backward ----


@triton.jit
def summarise_adjoint_steps(k, v, r, gy, t, log_decay, u, state, passed, adjoint, STEPS: tl.constexpr):
    # The adjoint's recurrence runs backward, but as a sum it can be taken forward: the share of a step in the adjoint
    # before the chunk is its share in the one before itself times all weights of the past up to there, `passed`.
    ks = load_rows(k, t, STEPS)
    vs = load_rows(v, t, STEPS)
    gs = load_rows(gy, t, STEPS)
    if r is not None:
        rs = load_rows(r, t, STEPS)
    gnum, gden = adjoint
    for i in tl.static_range(STEPS):
        kt, vt = key_logit(ks[i]), vs[i].to(tl.float32)
        reads = weigh(state[2], u + kt)
        y_num, y_den = mix(state, reads, vt)
        if r is None:
            inverse = reciprocal(y_den)
            h = passed * reads[0] * (gs[i].to(tl.float32) * inverse)
            y = y_num * inverse
        else:
            s, e = gate_of(rs[i])
            inverse = reciprocal(y_den * (1 + e))
            h = passed * reads[0] * (gs[i].to(tl.float32) * inverse * s)
            y = y_num * (inverse + inverse * e)
        gnum += h
        gden -= h * y
        advances = weigh(state[2] + log_decay, kt)
        passed *= advances[0]
        num, den = mix(state, advances, vt)
        state = (num, den, tl.maximum(state[2] + log_decay, kt))
    return state, passed, (gnum, gden)


@triton.jit
def backward_steps(k, v, r, gy, gk, gv, gr, t, C, log_decay, u, state, adjoint, sums, exists, STEPS: tl.constexpr):
    """Forward from the state before some steps, and back from the adjoint after them; sums are of log_decay and u."""
    ks = load_rows(k, t, STEPS)
    vs = load_rows(v, t, STEPS)
    gs = load_rows(gy, t, STEPS)
    gk += t * C
    gv += t * C
    if r is not None:
        rs = load_rows(r, t, STEPS)
        gr += t * C
    replayed = ()
    for i in tl.static_range(STEPS):
        kt, vt = key_logit(ks[i]), vs[i].to(tl.float32)
        reads = weigh(state[2], u + kt)
        advances = weigh(state[2] + log_decay, kt)
        replayed = replayed + ((state, reads, advances),)
        num, den = mix(state, advances, vt)
        state = (num, den, tl.maximum(state[2] + log_decay, kt))
    gnum, gden = adjoint
    g_log_decay, gu = sums
    for i in tl.static_range(STEPS - 1, -1, -1):
        state, reads, advances = replayed[i]
        vt = vs[i].to(tl.float32)

        y_num, y_den = mix(state, reads, vt)
        if r is None:
            inverse = reciprocal(y_den)
            y = y_num * inverse
            h = gs[i].to(tl.float32) * inverse
        else:
            s, e = gate_of(rs[i])
            inverse = reciprocal(y_den * (1 + e))
            y = y_num * inverse * (1 + e)
            h = gs[i].to(tl.float32) * inverse * s
            larger_gate = inverse * y_den
            gr_t = gs[i].to(tl.float32) * y * (e * larger_gate * larger_gate)
            tl.store(gr + i * C, gr_t.to(gr.dtype.element_ty), mask=exists)
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
        g_log_decay += state[0] * gnum + state[1] * gden

        h_past = reads[0] * h
        gnum += h_past
        gden -= h_past * y
    return (gnum, gden), (g_log_decay, gu)


@kernel
def summarise_adjoints(
    w, u, k, v, state, r, cu_seqlens, gy, checkpoints, gstate_out, chunk_adjoints,
    k_start_stride: tl.int64, k_time_stride: tl.int64, v_start_stride: tl.int64, v_time_stride: tl.int64,
    r_start_stride: tl.int64, r_time_stride: tl.int64, gy_start_stride: tl.int64, gy_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The adjoint before every chunk but a sequence's first, each of that chunk alone, the last one with gstate_out.

    Or before ALL chunks, of sequences that are not packed; only then is the state before the first one read.
    """
    cuts = chunks if ALL else cuts_of(cu_seqlens, T, chunk_len, chunks)
    b, slot, C, c, _ = locate(C_aligned, cuts, CHANNELS, ALIGNMENT)
    row = b * cuts + slot
    n, start, first, T, slot, chunks = place(cu_seqlens, b, slot, T, chunk_len, chunks, 0)
    if cu_seqlens is not None:
        if slot == chunks:
            return
    begin = slot * chunk_len if ALL else (slot + 1) * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    checkpoints = checkpoints_of(checkpoints, cu_seqlens, n, first, T, C, c, ALIGNMENT)
    if ALL:
        running = load_first_state(state, n, C, c, ALIGNMENT)
        if slot > 0:
            running = load_state(checkpoints + (begin // INTERVAL - 1) * 3 * C, C)
    else:
        running = load_state(checkpoints + (begin // INTERVAL - 1) * 3 * C, C)
    gnum = tl.zeros(c.shape, tl.float32)
    gden = gnum
    if gstate_out is not None:
        if slot == chunks - 2:
            last_max = tl.load(checkpoints + ((tl.cdiv(T, INTERVAL) - 1) * 3 + 2) * C)
            factor = tl.exp2((running[2] + (end - begin) * log_decay - last_max) * LOG2E)
            gnum, gden = load_adjoint(gstate_out + n * 3 * C, C, c, ALIGNMENT)
            gnum *= factor
            gden *= factor
    k = sequence(k, start, k_start_stride, k_time_stride, c, ALIGNMENT)
    v = sequence(v, start, v_start_stride, v_time_stride, c, ALIGNMENT)
    if r is not None:
        r = sequence(r, start, r_start_stride, r_time_stride, c, ALIGNMENT)
    gy = sequence(gy, start, gy_start_stride, gy_time_stride, c, ALIGNMENT)
    passed = tl.full(c.shape, 1.0, tl.float32)
    adjoint = (gnum, gden)
    # Rows of r are a fourth load for every step, and AMD's scalar registers hold the masks of no more gates; of ALL
    # chunks, those of gfx90a half as many.
    LOADED_HERE: tl.constexpr = LOADED if r is None else REPLAYED // 2 if ALL else REPLAYED
    whole = end - (end - begin) % LOADED_HERE
    for t in range(begin, whole, LOADED_HERE):
        running, passed, adjoint = summarise_adjoint_steps(
            k, v, r, gy, t, log_decay, u, running, passed, adjoint, LOADED_HERE
        )
    for t in range(whole, end):
        running, passed, adjoint = summarise_adjoint_steps(k, v, r, gy, t, log_decay, u, running, passed, adjoint, 1)
    # Without a mask: threads that repeat a channel have its values, and AMD's scalar registers are all in use.
    store_pair(chunk_adjoints + row * 2 * C, C, c, adjoint, tl.full(c.shape, 1, tl.int1), ALIGNMENT)


@triton.jit
def carry_adjoint(slots, maxes, last, C, stride, decay, adjoint, exists, SLOTS: tl.constexpr):
    # From slot `last` + 1 to SLOTS slots before it.
    own = ()
    for i in tl.static_range(SLOTS):
        slot = slots + (last - i) * 2 * C
        change = tl.load(maxes + (last - i) * stride) - tl.load(maxes + (last - i + 1) * stride)
        own = own + ((tl.load(slot), tl.load(slot + C), tl.exp2((decay + change) * LOG2E)),)
    gnum, gden = adjoint
    for i in tl.static_range(SLOTS):
        slot = slots + (last - i) * 2 * C
        gnum = own[i][0] + own[i][2] * gnum
        gden = own[i][1] + own[i][2] * gden
        tl.store(slot, gnum, mask=exists)
        tl.store(slot + C, gden, mask=exists)
    return gnum, gden


@kernel
def carry_adjoints(
    w, state, cu_seqlens, checkpoints, chunk_adjoints,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Joins the adjoints of a sequence's chunks from the last to the first, in place: slot i is that after chunk i.

    Of ALL chunks there is one more slot before these, that before the first chunk.
    """
    n, _, C, c, exists = locate(C_aligned, 1, CHANNELS, ALIGNMENT)
    n = n.to(tl.int64)
    first = n
    if cu_seqlens is not None:
        first, T = steps_of(cu_seqlens, n, T)
        chunks = tl.cdiv(T, chunk_len)
        if chunks < 3:
            return
    decay = chunk_len * log_decay_of(load_parameter(w, c, ALIGNMENT))
    # The max of the state after chunk i lies at maxes + i * stride.
    stride = chunk_len // INTERVAL * 3 * C
    maxes = checkpoints_of(checkpoints, cu_seqlens, n, first, T, C, c, ALIGNMENT) + stride - C
    row = n * chunks + 1 if ALL else adjoints_of(cu_seqlens, n, first, chunk_len, chunks)
    slots = columns(chunk_adjoints + row * 2 * C, c, ALIGNMENT)
    # The last slot is true already.
    adjoint = load_adjoint(chunk_adjoints + (row + chunks - 2) * 2 * C, C, c, ALIGNMENT)
    left_over = (chunks - 2) % LOADED
    for passed in range(0, chunks - 2 - left_over, LOADED):
        adjoint = carry_adjoint(slots, maxes, chunks - 3 - passed, C, stride, decay, adjoint, exists, LOADED)
    for passed in range(left_over):
        adjoint = carry_adjoint(slots, maxes, left_over - 1 - passed, C, stride, decay, adjoint, exists, 1)
    if ALL:
        change = load_first_state(state, n, C, c, ALIGNMENT)[2] - tl.load(maxes)
        factor = tl.exp2((decay + change) * LOG2E)
        before = chunk_adjoints + (row - 1) * 2 * C
        own = load_adjoint(before, C, c, ALIGNMENT)
        joined = (own[0] + factor * adjoint[0], own[1] + factor * adjoint[1])
        store_pair(before, C, c, joined, exists, ALIGNMENT)


@kernel
def backward(
    w, u, k, v, state, r, cu_seqlens, gy, checkpoints, gstate_out, chunk_adjoints, parked, gk, gv, gstate, gr, partials,
    k_start_stride: tl.int64, k_time_stride: tl.int64, v_start_stride: tl.int64, v_time_stride: tl.int64,
    r_start_stride: tl.int64, r_time_stride: tl.int64, gy_start_stride: tl.int64, gy_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, chunk_len: tl.int32, chunks: tl.int32,
    CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """gk, gv, gr if there is an r, the gradient of the first state, and each chunk's part of those of log_decay and u.

    Takes the chunk interval by interval, from the last to the first. It advances from the interval's checkpoint and
    parks the state before every few steps in memory of its own; then it takes these few steps, from the last to the
    first, forward once more and back.
    """
    b, chunk, C, c, exists = locate(C_aligned, chunks, CHANNELS, ALIGNMENT)
    row = b * chunks + chunk
    zero = tl.zeros(c.shape, tl.float32)
    n, start, first, T, chunk, chunks = place(cu_seqlens, b, chunk, T, chunk_len, chunks, 1)
    if cu_seqlens is not None:
        if (chunk == chunks) | (T == 0):
            store_pair(partials + row * 2 * C, C, c, (zero, zero), exists, ALIGNMENT)
            if chunk == 0:
                # Without steps, the gradient is what arrived.
                arrived = (zero, zero, zero)
                if gstate_out is not None:
                    arrived = load_state(columns(gstate_out + n * 3 * C, c, ALIGNMENT), C)
                store_state(columns(gstate + n * 3 * C, c, ALIGNMENT), C, arrived, exists)
            return
    log_decay = log_decay_of(load_parameter(w, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    begin = chunk * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    checkpoints = checkpoints_of(checkpoints, cu_seqlens, n, first, T, C, c, ALIGNMENT)
    adjoint = (zero, zero)
    if chunk < chunks - 1:
        after = adjoints_of(cu_seqlens, n, first, chunk_len, chunks) + chunk
        adjoint = load_adjoint(chunk_adjoints + after * 2 * C, C, c, ALIGNMENT)
    elif gstate_out is not None:
        adjoint = load_adjoint(gstate_out + n * 3 * C, C, c, ALIGNMENT)
    sums = (zero, zero)

    k = sequence(k, start, k_start_stride, k_time_stride, c, ALIGNMENT)
    v = sequence(v, start, v_start_stride, v_time_stride, c, ALIGNMENT)
    if r is not None:
        r = sequence(r, start, r_start_stride, r_time_stride, c, ALIGNMENT)
    gy = sequence(gy, start, gy_start_stride, gy_time_stride, c, ALIGNMENT)
    gk = columns(gk + first * C, c, ALIGNMENT)
    gv = columns(gv + first * C, c, ALIGNMENT)
    if r is not None:
        gr = columns(gr + first * C, c, ALIGNMENT)
    parked += tl.program_id(0).to(tl.int64) * (PARKED * 3 * CHANNELS)
    parked = tl.max_contiguous(tl.multiple_of(parked + tl.arange(0, CHANNELS), 16), 16)
    all_channels = tl.full(c.shape, 1, tl.int1)

    intervals = tl.cdiv(end - begin, INTERVAL)
    for behind in range(intervals):
        t_first = begin + (intervals - 1 - behind) * INTERVAL
        steps = tl.minimum(end - t_first, INTERVAL)
        left_over = steps % LOADED
        whole = t_first + steps - left_over
        running = load_first_state(state, n, C, c, ALIGNMENT)
        if t_first > 0:
            running = load_state(checkpoints + (t_first // INTERVAL - 1) * 3 * C, C)

        slot = parked
        for t in range(t_first, whole, LOADED):
            for part in tl.static_range(LOADED // REPLAYED):
                store_state(slot, CHANNELS, running, all_channels)
                slot += 3 * CHANNELS
                running = advance_steps(k, v, t + part * REPLAYED, log_decay, running, REPLAYED)
        for t in range(whole, whole + left_over):
            store_state(slot, CHANNELS, running, all_channels)
            slot += 3 * CHANNELS
            running = advance_steps(k, v, t, log_decay, running, 1)
        # Triton may give a channel's store and load to two threads.
        tl.debug_barrier()

        # The next checkpoint may have been joined, and not advanced to: the same state in another gauge.
        max_after = tl.load(checkpoints + (t_first // INTERVAL * 3 + 2) * C)
        change = tl.exp2((running[2] - max_after) * LOG2E)
        adjoint = (adjoint[0] * change, adjoint[1] * change)
        for i in range(left_over):
            slot -= 3 * CHANNELS
            before = load_state(slot, CHANNELS)
            t = whole + left_over - 1 - i
            adjoint, sums = backward_steps(
                k, v, r, gy, gk, gv, gr, t, C, log_decay, u, before, adjoint, sums, exists, 1
            )
        for i in range(REPLAYED, whole - t_first + 1, REPLAYED):
            slot -= 3 * CHANNELS
            before = load_state(slot, CHANNELS)
            adjoint, sums = backward_steps(
                k, v, r, gy, gk, gv, gr, whole - i, C, log_decay, u, before, adjoint, sums, exists, REPLAYED
            )
        tl.debug_barrier()

    store_pair(partials + row * 2 * C, C, c, sums, exists, ALIGNMENT)
    if chunk == 0:
        # The gradient of max follows from the others for consumers that respect the state's gauge.
        num, den, _ = load_first_state(state, n, C, c, ALIGNMENT)
        gnum, gden = adjoint
        before = (gnum, gden, num * gnum + den * gden)
        store_state(columns(gstate + n * 3 * C, c, ALIGNMENT), C, before, exists)


@kernel
def reduce(w, partials, gw, gu, C: tl.int32, rows: tl.int32, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Sums the partial gradients over all rows, in an order that depends on their number alone.

    Without a w, gw is the gradient of the log-decay itself.
    """
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
    g = tl.sum(g_log_decay, 0)
    if w is not None:
        # The log-decay -exp(w) is its own derivative.
        g *= log_decay_of(tl.load(w + c, mask=exists, other=0.0).to(tl.float32))
    tl.store(gw + c, g.to(gw.dtype.element_ty), mask=exists)
    tl.store(gu + c, tl.sum(g_u, 0).to(gu.dtype.element_ty), mask=exists)


# ---- one token ----


@kernel
def step(
    w, u, k, v, r, state, y, k_stride: tl.int64, v_stride: tl.int64, r_stride: tl.int64,
    state_batch_stride: tl.int64, state_row_stride: tl.int64, state_channel_stride: tl.int64,
    C: tl.int32, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of one token, gated where there is an r, and the state in place."""
    b, _, _, c, exists = locate(C, 1, CHANNELS, 1)
    b = b.to(tl.int64)
    log_decay = log_decay_of(load_parameter(w, c, 1))
    kt = key_logit(tl.load(k + b * k_stride + c))
    vt = tl.load(v + b * v_stride + c).to(tl.float32)
    state += b * state_batch_stride + c * state_channel_stride
    before = normal(load_state(state, state_row_stride))
    y_num, y_den = mix(before, weigh(before[2], load_parameter(u, c, 1) + kt), vt)
    yt = y_num * reciprocal(y_den)
    if r is not None:
        yt *= tl.sigmoid(tl.load(r + b * r_stride + c).to(tl.float32))
    tl.store(y + b * C + c, yt.to(y.dtype.element_ty), mask=exists)
    store_state(state, state_row_stride, advance(before, log_decay, kt, vt), exists)
