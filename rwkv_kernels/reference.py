"""The oracle: the WKV operator in plain torch, written to be read and to be believed.

Every test compares with this file. It shares no code with the kernels, imports torch alone, and has no derivative of
its own: gradients, of any order and in either mode, are torch's.
"""

import math

import torch
from torch import Tensor

__all__ = ["EMPTY_MAX", "bi_wkv", "bi_wkv_direct", "empty_state", "state_dtype", "wkv", "wkv_direct"]

EMPTY_MAX = -1e38
# Of |log_decay| where it has a sign: beyond, every weight but the largest is zero whatever the keys are, and up to it
# the multiples over any number of steps are finite.
LARGEST_LOG_DECAY = math.exp(64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all sums, and of the state, for a k of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _log_decay(w: Tensor, dtype: torch.dtype) -> Tensor:
    """-exp(w), finite for any w but NaN: an infinite one has no gradient, and 0 · inf is NaN.

    Beyond e^64 a decay is zero whatever the keys are.
    """
    w = w.to(dtype)
    return -torch.exp(w.masked_fill(w > 64, 64))


def empty_state(k: Tensor, sequences: int) -> Tensor:
    """The state before the first step, [N, 3, C]: (num, den, max) = (0, 0, -1e38), finite because inf - inf is NaN."""
    state = k.new_zeros((sequences, 3, k.shape[2]), dtype=state_dtype(k.dtype))
    state[:, 2] = EMPTY_MAX
    return state


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, step by step, in log space (arXiv 2305.13048, appendix B, equations 19 to 28).

    Args:
        w: [C], the raw decay; the log-decay per step is -exp(w).
        u: [C], the bonus of the present token.
        k, v: [B, T, C], keys and values.
        state: [B, 3, C], (num, den, max), or None for the empty state.
        r: [B, T, C], the receptance before its sigmoid, or None where nothing gates y.
        cu_seqlens: [N + 1], integers: sequence n has the steps from cu_seqlens[n] to before cu_seqlens[n + 1] of
            B = 1, and N is the number of states. No element is read on the host. None for B sequences of T steps.

    Returns:
        y [B, T, C] in k's dtype, sigmoid(r)·y with r, and the state [B, 3, C] after each sequence's last step. All sums
        are float32, for float64 inputs float64.
    """
    dtype = state_dtype(k.dtype)
    log_decay, u = _log_decay(w, dtype), u.to(dtype)
    if state is None:
        state = empty_state(k, k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    num, den, top = state.to(dtype).unbind(1)
    top = torch.where(den == 0, EMPTY_MAX, top)
    if k.shape[1] == 0:
        return torch.zeros_like(k), torch.stack((num, den, top), 1)
    if cu_seqlens is not None:
        given = torch.stack((num, den, top), 1)
        t = torch.arange(k.shape[1], device=k.device)
        of_step = torch.searchsorted(cu_seqlens[1:], t.to(cu_seqlens.dtype), right=True)  # each step's sequence
        starts = cu_seqlens[of_step] == t
        states = []
        num, den, top = empty_state(k, 1).unbind(1)
    outputs = []
    for step, (kt, vt) in enumerate(zip(k.to(dtype).unbind(1), v.to(dtype).unbind(1), strict=True)):
        if cu_seqlens is not None:
            first = given[of_step[step : step + 1]].unbind(1)
            num, den, top = (torch.where(starts[step], a, b) for a, b in zip(first, (num, den, top), strict=True))
        scale = torch.maximum(top, u + kt).detach()
        past, present = torch.exp(top - scale), torch.exp(u + kt - scale)
        outputs.append((past * num + present * vt) / (past * den + present))

        scale = torch.maximum(top + log_decay, kt).detach()
        past, present = torch.exp(top + log_decay - scale), torch.exp(kt - scale)
        num, den, top = past * num + present * vt, past * den + present, scale
        if cu_seqlens is not None:
            states.append(torch.cat((num, den, top)))
    y = torch.stack(outputs, 1)
    if r is not None:
        y = torch.sigmoid(r.to(dtype)) * y
    state = torch.stack((num, den, top), 1)
    if cu_seqlens is not None:
        has_steps = (cu_seqlens[1:] > cu_seqlens[:-1])[:, None, None]
        state = torch.where(has_steps, torch.stack(states)[(cu_seqlens[1:] - 1).clamp(min=0)], given)
    return y.to(k.dtype), state


def wkv_direct(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition as a softmax over all earlier steps (arXiv 2305.13048, equation 14): O(T²) time and memory.

    The logit of step s seen from t is k_s + (t - 1 - s)·log_decay for s < t, and u + k_t for s = t. Arguments and
    result are those of `wkv`.
    """
    dtype = state_dtype(k.dtype)
    steps = k.shape[1]
    log_decay, u, keys = _log_decay(w, dtype), u.to(dtype), k.to(dtype)
    t = torch.arange(steps, device=k.device)
    distance = (t[:, None] - 1 - t[None, :]).clamp(min=0).to(dtype)  # [t, s]
    past = keys[:, None] + distance[None, :, :, None] * log_decay
    logits = torch.where((t[None, :] == t[:, None])[None, :, :, None], (u + keys)[:, None], past)
    logits = logits.masked_fill((t[None, :] > t[:, None])[None, :, :, None], -torch.inf)
    return torch.einsum("btsc,bsc->btc", torch.softmax(logits, 2), v.to(dtype)).to(k.dtype)


def bi_wkv(
    log_decay: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The bidirectional operator by two recurrences in log space, one from either end (arXiv 2403.02308, equation 3).

    Args:
        log_decay: [C], of either sign, the factor of a weight for every step of distance.
        u: [C], the bonus of the present token.
        k, v, r, cu_seqlens: As for `wkv`.

    Returns:
        y [B, T, C] in k's dtype, sigmoid(r)·y with r. All sums are float32, for float64 inputs float64.
    """
    dtype = state_dtype(k.dtype)
    if k.shape[1] == 0:
        return k.clone()  # no element, but a place in the graph
    log_decay, u, keys, values = _bounded(log_decay.to(dtype)), u.to(dtype), k.to(dtype), v.to(dtype)
    first = last = None
    if cu_seqlens is not None:
        t = torch.arange(k.shape[1], device=k.device)
        first, last = torch.isin(t, cu_seqlens), torch.isin(t + 1, cu_seqlens)
    before = _states_before(log_decay, keys, values, first)
    after = _states_before(log_decay, keys.flip(1), values.flip(1), None if last is None else last.flip(0))
    (num, den, top), (num_after, den_after, top_after) = before, (x.flip(1) for x in after)
    scale = torch.maximum(torch.maximum(top, top_after), u + keys).detach()
    past, future, present = torch.exp(top - scale), torch.exp(top_after - scale), torch.exp(u + keys - scale)
    y = (past * num + future * num_after + present * values) / (past * den + future * den_after + present)
    if r is not None:
        y = torch.sigmoid(r.to(dtype)) * y
    return y.to(k.dtype)


def _bounded(log_decay: Tensor) -> Tensor:
    """Not by clamp, whose gradient at NaN is zero."""
    bound = LARGEST_LOG_DECAY
    return log_decay.masked_fill(log_decay > bound, bound).masked_fill(log_decay < -bound, -bound)


def _states_before(log_decay: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None) -> list[Tensor]:
    """(num, den, max) before each step, [B, T, C] each; a step in `starts` [T] has nothing before it."""
    num = den = torch.zeros_like(keys[:, 0])
    empty = top = torch.full_like(num, EMPTY_MAX)
    states = []
    for t, (kt, vt) in enumerate(zip(keys.unbind(1), values.unbind(1), strict=True)):
        if starts is not None:
            num, den, top = (torch.where(starts[t], a, b) for a, b in ((0, num), (0, den), (empty, top)))
        states.append((num, den, top))
        scale = torch.maximum(top + log_decay, kt).detach()
        past, present = torch.exp(top + log_decay - scale), torch.exp(kt - scale)
        num, den, top = past * num + present * vt, past * den + present, scale
    return [torch.stack(x, 1) for x in zip(*states, strict=True)]


def bi_wkv_direct(log_decay: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor | None = None) -> Tensor:
    """The definition as a softmax over all steps: O(T²) time and memory.

    The logit of step s seen from t is k_s + (|t - s| - 1)·log_decay for s ≠ t, and u + k_t for s = t. Arguments and
    result are those of `bi_wkv`.
    """
    dtype = state_dtype(k.dtype)
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t[:, None] - t[None, :]).abs()[None, :, :, None]  # [1, t, s, 1]
    log_decay, u, keys = _bounded(log_decay.to(dtype)), u.to(dtype), k.to(dtype)[:, None]
    logits = torch.where(distance == 0, u + keys, keys + (distance - 1).to(dtype) * log_decay)
    y = torch.einsum("btsc,bsc->btc", torch.softmax(logits, 2), v.to(dtype))
    return (y if r is None else torch.sigmoid(r.to(dtype)) * y).to(k.dtype)
