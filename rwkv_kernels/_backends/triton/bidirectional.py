"""The Triton kernels of the bidirectional operator: what kernels.py has for one direction, taken from either end.

A program is one warp. It owns a tile of neighbouring channels of one sequence, over all its steps. What stands after a
step is a causal state of the sequence in reverse: the program first goes from the last step to the first and parks that
state at the end of every group of steps, in memory of its own. Then it goes forward with the state before a step in
registers, and replays a group's states after its steps from the parked one. Backward parks the state before a group,
too, and goes back once more. docs/bidirectional.md derives the operator and its gradient.

A state's maximum is rounded in every step, with one sign where weights grow with the distance, so sums follow what it
loses; after each group it takes this back, which `settled` does.
"""

import triton
import triton.language as tl

from ... import reference
from .kernels import (
    EMPTY_MAX,
    LOG2E,
    REPLAYED,
    columns,
    constant,
    gate_of,
    kernel,
    key_logit,
    load_first_state,
    load_parameter,
    load_rows,
    load_state,
    locate,
    reciprocal,
    sequence,
    steps_of,
    store_pair,
    store_state,
)
from .plan import BI_BACKWARD_PARKED, BI_FORWARD_PARKED

__all__ = ["bi_backward", "bi_forward"]

BOUND = constant(reference.LARGEST_LOG_DECAY)
# Of a maximum in a step, by rounding, as far as sums follow it.
LARGEST_LOSS = constant(0.125)
FORWARD_PARKED = constant(BI_FORWARD_PARKED)
BACKWARD_PARKED = constant(BI_BACKWARD_PARKED)

# Sums that leave this range are moved back into it, and the maximum by the logarithm.
FAR = constant(65536.0)
LOG_OF_FAR = constant(11.090354888959125)


# ---- a step ----


@triton.jit
def bounded(log_decay):
    # NaN stays.
    return tl.where(log_decay > BOUND, BOUND, tl.where(log_decay < -BOUND, -BOUND, log_decay))


@triton.jit
def weights_of_advance(top, log_decay, k):
    """The next maximum, and the weights of the past and of the step relative to it as it is rounded.

    A maximum whose roundings are large cannot take them back: there they are ignored.
    """
    following = tl.maximum(top + log_decay, k)
    past = (top - following) + log_decay
    held = tl.where(k < following, 0.0, tl.minimum(past, 0.0))
    is_fine = tl.abs(following) < tl.abs(following) + LARGEST_LOSS
    past = tl.exp2(tl.where(is_fine, past, held) * LOG2E)
    return following, past, tl.exp2((k - following) * LOG2E)


@triton.jit
def weights_of_read(before_top, after_top, logit):
    top = tl.maximum(tl.maximum(before_top, after_top), logit)
    before, after = tl.exp2((before_top - top) * LOG2E), tl.exp2((after_top - top) * LOG2E)
    return before, after, tl.exp2((logit - top) * LOG2E)


@triton.jit
def settled(state):
    """The same state with sums near 1, and the factor to these from the given ones."""
    num, den, top = state
    below = tl.where(den > 0, -LOG_OF_FAR, 0.0)  # an empty state stays
    moved = top + tl.where(den > FAR, LOG_OF_FAR, tl.where(den < 1 / FAR, below, 0.0))
    factor = tl.exp2((top - moved) * LOG2E)
    return (num * factor, den * factor, moved), factor


@triton.jit
def replay_step(state, log_decay, k, v):
    """The state with the weights of its advance, and the state after the step."""
    following, past, present = weights_of_advance(state[2], log_decay, k)
    advanced = (past * state[0] + present * v, past * state[1] + present, following)
    return (state[0], state[1], state[2], past, present), advanced


@triton.jit
def replay_before(ks, vs, log_decay, state, STEPS: tl.constexpr):
    """The first result of `replay_step` for every step of a group, and the state after the last one."""
    replayed = ()
    for i in tl.static_range(STEPS):
        at, state = replay_step(state, log_decay, ks[i], vs[i])
        replayed = replayed + (at,)
    return replayed, state


@triton.jit
def replay_after(ks, vs, log_decay, state, STEPS: tl.constexpr):
    """The same of the states in reverse, in the order of steps, from that after the last step."""
    replayed = ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        at, state = replay_step(state, log_decay, ks[i], vs[i])
        replayed = (at,) + replayed
    return replayed, state


@triton.jit
def load_keys(k, t, STEPS: tl.constexpr):
    ks = ()
    rows = load_rows(k, t, STEPS)
    for i in tl.static_range(STEPS):
        ks = ks + (key_logit(rows[i]),)
    return ks


@triton.jit
def load_numbers(x, t, STEPS: tl.constexpr):
    numbers = ()
    rows = load_rows(x, t, STEPS)
    for i in tl.static_range(STEPS):
        numbers = numbers + (rows[i].to(tl.float32),)
    return numbers


# ---- where groups are ----


@triton.jit
def place_of(cu_seqlens, n, T):
    """Where sequence n starts in k's batch and in a contiguous tensor's steps, and the number of its steps."""
    if cu_seqlens is None:
        found = (n, n * T, T)
    else:
        first, steps = steps_of(cu_seqlens, n, T)
        found = (first, first, steps)
    return found


@triton.jit
def parked_of(parked, n, first, slots, C, STRIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """The program's first slot of `slots` in its tile of channels: a sequence has one for every group.

    A group is REPLAYED steps, or one of the steps that are left over, so that sequence n has its slots from
    first // REPLAYED + n * (REPLAYED - 1) on.
    """
    tile = tl.program_id(0) % tl.cdiv(C, CHANNELS)
    slot = tile * slots + first // REPLAYED + n * (REPLAYED - 1)
    parked += slot * STRIDE
    return tl.max_contiguous(tl.multiple_of(parked + tl.arange(0, CHANNELS), 16), 16)


# ---- forward ----


@triton.jit
def park_after(k, v, t, slot, log_decay, after, exists, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Parks the state after a group, and goes to that after the group before it."""
    store_state(slot, CHANNELS, after, exists)
    _, after = replay_after(load_keys(k, t, STEPS), load_numbers(v, t, STEPS), log_decay, after, STEPS)
    after, _ = settled(after)
    return after


@triton.jit
def park_all_after(k, v, T, whole, slot, log_decay, STRIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """Parks the state after every group, from the last one to the first; `slot` is beyond the last one's."""
    zero = tl.zeros(log_decay.shape, tl.float32)
    everyone = tl.full(log_decay.shape, 1, tl.int1)
    after = (zero, zero, zero + EMPTY_MAX)
    for behind in range(T - whole):
        t = T - 1 - behind
        slot -= STRIDE
        after = park_after(k, v, t, slot, log_decay, after, everyone, 1, CHANNELS)
    for behind in range(REPLAYED, whole + 1, REPLAYED):
        t = whole - behind
        slot -= STRIDE
        after = park_after(k, v, t, slot, log_decay, after, everyone, REPLAYED, CHANNELS)
    # Triton may give a channel's store and load to two threads.
    tl.debug_barrier()


@triton.jit
def bi_forward_steps(k, v, r, y, t, C, slot, log_decay, u, before, exists, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    ks, vs = load_keys(k, t, STEPS), load_numbers(v, t, STEPS)
    if r is not None:
        rs = load_rows(r, t, STEPS)
    replayed, _ = replay_after(ks, vs, log_decay, load_state(slot, CHANNELS), STEPS)
    y += t * C
    for i in tl.static_range(STEPS):
        after = replayed[i]
        past, future, present = weights_of_read(before[2], after[2], u + ks[i])
        y_num = past * before[0] + future * after[0] + present * vs[i]
        y_den = past * before[1] + future * after[1] + present
        if r is None:
            yt = y_num * reciprocal(y_den)
        else:
            s, e = gate_of(rs[i])
            yt = y_num * reciprocal(y_den * (1 + e)) * s
        tl.store(y + i * C, yt.to(y.dtype.element_ty), mask=exists)
        _, before = replay_step(before, log_decay, ks[i], vs[i])
    before, _ = settled(before)
    return before


@kernel
def bi_forward(
    log_decay, u, k, v, r, cu_seqlens, parked, y,
    k_start_stride: tl.int64, k_time_stride: tl.int64, v_start_stride: tl.int64, v_time_stride: tl.int64,
    r_start_stride: tl.int64, r_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, slots: tl.int64, CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """y, gated where there is an r."""
    n, _, C, c, exists = locate(C_aligned, 1, CHANNELS, ALIGNMENT)
    n = n.to(tl.int64)
    start, first, T = place_of(cu_seqlens, n, T)
    log_decay = bounded(load_parameter(log_decay, c, ALIGNMENT))
    u = load_parameter(u, c, ALIGNMENT)
    k = sequence(k, start, k_start_stride, k_time_stride, c, ALIGNMENT)
    v = sequence(v, start, v_start_stride, v_time_stride, c, ALIGNMENT)
    if r is not None:
        r = sequence(r, start, r_start_stride, r_time_stride, c, ALIGNMENT)
    y = columns(y + first * C, c, ALIGNMENT)
    STRIDE: tl.constexpr = FORWARD_PARKED * CHANNELS
    slot = parked_of(parked, n, first, slots, C, STRIDE, CHANNELS)
    whole = T - T % REPLAYED
    groups = (whole // REPLAYED + T - whole).to(tl.int64)
    park_all_after(k, v, T, whole, slot + groups * STRIDE, log_decay, STRIDE, CHANNELS)
    before = load_first_state(None, n, C, c, ALIGNMENT)
    for t in range(0, whole, REPLAYED):
        before = bi_forward_steps(k, v, r, y, t, C, slot, log_decay, u, before, exists, REPLAYED, CHANNELS)
        slot += STRIDE
    for t in range(whole, T):
        before = bi_forward_steps(k, v, r, y, t, C, slot, log_decay, u, before, exists, 1, CHANNELS)
        slot += STRIDE


# ---- backward ----


@triton.jit
def read_adjoint(before, after, logit, v, g, r):
    """The adjoints that a read gives to num before it, to num after it and to the present value; y, and that of r.

    Without an r, the last one means nothing.
    """
    past, future, present = weights_of_read(before[2], after[2], logit)
    y_num = past * before[0] + future * after[0] + present * v
    y_den = past * before[1] + future * after[1] + present
    if r is None:
        inverse = reciprocal(y_den)
        y = y_num * inverse
        h = g * inverse
        gr = h
    else:
        s, e = gate_of(r)
        inverse = reciprocal(y_den * (1 + e))
        y = y_num * inverse * (1 + e)
        h = g * inverse * s
        larger_gate = inverse * y_den
        gr = g * y * (e * larger_gate * larger_gate)
    return past * h, future * h, present * h, y, gr


@triton.jit
def adjoint_after_steps(
    k, v, r, gy, t, slot, log_decay, u, before, adjoint, exists, STEPS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Parks the state before a group and the adjoint of that after it, and goes over the group."""
    ks, vs, gs = load_keys(k, t, STEPS), load_numbers(v, t, STEPS), load_numbers(gy, t, STEPS)
    if r is not None:
        rs = load_rows(r, t, STEPS)
    store_state(slot + 3 * CHANNELS, CHANNELS, before, exists)
    replayed, last = replay_after(ks, vs, log_decay, load_state(slot, CHANNELS), STEPS)
    _, change = settled(last)
    gnum, gden = adjoint[0] * change, adjoint[1] * change
    tl.store(slot + 6 * CHANNELS, gnum)
    tl.store(slot + 7 * CHANNELS, gden)
    for i in tl.static_range(STEPS):
        after = replayed[i]
        _, h, _, y, _ = read_adjoint(before, after, u + ks[i], vs[i], gs[i], rs[i] if r is not None else None)
        gnum = after[3] * gnum + h
        gden = after[3] * gden - h * y
        _, before = replay_step(before, log_decay, ks[i], vs[i])
    before, _ = settled(before)
    return before, (gnum, gden)


@triton.jit
def bi_backward_steps(
    k, v, r, gy, gk, gv, gr, t, C, slot, log_decay, u, adjoint, sums, exists,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of a group, from the adjoint of the state before what follows; sums are of log_decay and u."""
    ks, vs, gs = load_keys(k, t, STEPS), load_numbers(v, t, STEPS), load_numbers(gy, t, STEPS)
    if r is not None:
        rs = load_rows(r, t, STEPS)
    offset = t * C
    befores, following = replay_before(ks, vs, log_decay, load_state(slot + 3 * CHANNELS, CHANNELS), STEPS)
    afters, _ = replay_after(ks, vs, log_decay, load_state(slot, CHANNELS), STEPS)
    gnum, gden = tl.load(slot + 6 * CHANNELS), tl.load(slot + 7 * CHANNELS)
    g_log_decay, gu = sums
    reads = ()
    for i in tl.static_range(STEPS):
        before, after = befores[i], afters[i]
        past, h, present, y, gr_t = read_adjoint(
            before, after, u + ks[i], vs[i], gs[i], rs[i] if r is not None else None
        )
        if r is not None:
            tl.store(gr + offset + i * C, gr_t.to(gr.dtype.element_ty), mask=exists)
        gu_t = present * (vs[i] - y)
        gu += gu_t
        gv_t = after[4] * gnum + present
        gk_t = after[4] * (vs[i] * gnum + gden) + gu_t
        # Paired step by step, as in one direction.
        gnum *= after[3]
        gden *= after[3]
        g_log_decay += after[0] * gnum + after[1] * gden
        gnum += h
        gden -= h * y
        reads = reads + ((past, past * y, gv_t, gk_t),)
    _, change = settled(following)
    gnum, gden = adjoint[0] * change, adjoint[1] * change
    for i in tl.static_range(STEPS - 1, -1, -1):
        before = befores[i]
        h, hy, gv_t, gk_t = reads[i]
        gv_t += before[4] * gnum
        gk_t += before[4] * (vs[i] * gnum + gden)
        tl.store(gv + offset + i * C, gv_t.to(gv.dtype.element_ty), mask=exists)
        tl.store(gk + offset + i * C, gk_t.to(gk.dtype.element_ty), mask=exists)
        gnum *= before[3]
        gden *= before[3]
        g_log_decay += before[0] * gnum + before[1] * gden
        gnum += h
        gden -= hy
    return (gnum, gden), (g_log_decay, gu)


@kernel
def bi_backward(
    log_decay, u, k, v, r, cu_seqlens, gy, parked, gk, gv, gr, partials,
    k_start_stride: tl.int64, k_time_stride: tl.int64, v_start_stride: tl.int64, v_time_stride: tl.int64,
    r_start_stride: tl.int64, r_time_stride: tl.int64, gy_start_stride: tl.int64, gy_time_stride: tl.int64,
    T: tl.int32, C_aligned: tl.int32, slots: tl.int64, CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """gk, gv, gr if there is an r, and each sequence's part of the gradients of log_decay and u.

    Three times over the steps: back, to park the state after every group; forward, to park that before it and the
    adjoint of the other, which goes forward; and back, with the adjoint of that before.
    """
    n, _, C, c, exists = locate(C_aligned, 1, CHANNELS, ALIGNMENT)
    n = n.to(tl.int64)
    start, first, T = place_of(cu_seqlens, n, T)
    given = load_parameter(log_decay, c, ALIGNMENT)
    log_decay = bounded(given)
    u = load_parameter(u, c, ALIGNMENT)
    k = sequence(k, start, k_start_stride, k_time_stride, c, ALIGNMENT)
    v = sequence(v, start, v_start_stride, v_time_stride, c, ALIGNMENT)
    if r is not None:
        r = sequence(r, start, r_start_stride, r_time_stride, c, ALIGNMENT)
        gr = columns(gr + first * C, c, ALIGNMENT)
    gy = sequence(gy, start, gy_start_stride, gy_time_stride, c, ALIGNMENT)
    gk = columns(gk + first * C, c, ALIGNMENT)
    gv = columns(gv + first * C, c, ALIGNMENT)
    STRIDE: tl.constexpr = BACKWARD_PARKED * CHANNELS
    slot = parked_of(parked, n, first, slots, C, STRIDE, CHANNELS)
    whole = T - T % REPLAYED
    groups = (whole // REPLAYED + T - whole).to(tl.int64)
    park_all_after(k, v, T, whole, slot + groups * STRIDE, log_decay, STRIDE, CHANNELS)

    before = load_first_state(None, n, C, c, ALIGNMENT)
    zero = tl.zeros(c.shape, tl.float32)
    everyone = tl.full(c.shape, 1, tl.int1)
    adjoint = (zero, zero)
    for t in range(0, whole, REPLAYED):
        before, adjoint = adjoint_after_steps(
            k, v, r, gy, t, slot, log_decay, u, before, adjoint, everyone, REPLAYED, CHANNELS
        )
        slot += STRIDE
    for t in range(whole, T):
        before, adjoint = adjoint_after_steps(
            k, v, r, gy, t, slot, log_decay, u, before, adjoint, everyone, 1, CHANNELS
        )
        slot += STRIDE
    tl.debug_barrier()

    adjoint = (zero, zero)
    sums = (zero, zero)
    for behind in range(T - whole):
        t = T - 1 - behind
        slot -= STRIDE
        adjoint, sums = bi_backward_steps(
            k, v, r, gy, gk, gv, gr, t, C, slot, log_decay, u, adjoint, sums, exists, 1, CHANNELS
        )
    for behind in range(REPLAYED, whole + 1, REPLAYED):
        t = whole - behind
        slot -= STRIDE
        adjoint, sums = bi_backward_steps(
            k, v, r, gy, gk, gv, gr, t, C, slot, log_decay, u, adjoint, sums, exists, REPLAYED, CHANNELS
        )
    # Beyond the bound a log-decay has no part in the result.
    g_log_decay, gu = sums
    g_log_decay = tl.where(tl.abs(given) > BOUND, 0.0, g_log_decay)
    store_pair(partials + n * 2 * C, C, c, (g_log_decay, gu), exists, ALIGNMENT)
