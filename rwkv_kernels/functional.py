"""The public functions: arguments are checked here, once for all backends.

What is no tensor but acts as one by torch's protocol, as torch.fx's proxies do, is asked first.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import reference, shardings
from ._backends.registry import Forward, select
from .autograd import refuse_onnx, untraced
from .inputs import SEQUENCE, TOKEN, check, check_boundaries

__all__ = ["bi_wkv", "empty_state", "wkv", "wkv_step"]


@overload
def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The WKV operator of RWKV-4: for each channel, a softmax-weighted mean of the values up to each step.

    y_t = (Σ_{s<t} e^{(t-1-s)·log_decay + k_s} v_s + e^{u+k_t} v_t) / (the same sum without v), log_decay = -exp(w).

    Args:
        w: [C], any floating dtype: the raw decay ("time_decay"); the log-decay per step is -exp(w).
        u: [C], any floating dtype: the bonus of the present token ("time_first"), a logit.
        k, v: [B, T, C], float32, float16, bfloat16 or float64, both the same: keys (logits) and values. Under
            autocast they may differ, and the wider dtype is used.
        state: [B, 3, C], float32, or float64 for float64 inputs: (num, den, max) as an earlier call returned it, or
            None for an empty one.
        r: [B, T, C] in k's dtype, the receptance before its sigmoid, or None. It gates y, which is then computed in the
            state's dtype and rounded once; the state does not depend on it. Under autocast it may differ like k and v.
        cu_seqlens: [N + 1], int32 or int64, on k's device, or None: N sequences that are packed into one row, with k
            and v (and r) [1, total, C]. Sequence n has the steps from cu_seqlens[n] to before cu_seqlens[n + 1], and is
            as in a call of its own. States are [N, 3, C]; a sequence without steps hands its state on. On a GPU no
            element is read on the host, and boundaries that do not rise from 0 to total give unspecified results.
        return_state: Also return the state after the last step, which continues the sequence as if it was never cut.
        backend: "auto", or a name from `backends()`.

    Returns:
        y [B, T, C] in k's dtype, with r sigmoid(r)·y, or (y, state). All sums are accumulated in the state's dtype.

    Differentiable in w, u, k, v, state and r, including the gradient that arrives at the returned state. A state stands
    for the sums num·e^max and den·e^max, so (num·e^a, den·e^a, max - a) is the same state, and gradients are right for
    consumers that respect this, as another wkv call does.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype, cu_seqlens on the CPU does not rise
            from 0 to total, or the backend is unknown.
        BackendUnavailable: the backend cannot run this call.
        NotImplementedError: a second derivative or a forward-mode one is asked of a compiled backend.

    Source: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048), equation 14.
    """
    if not isinstance(k, Tensor) or not isinstance(v, Tensor):
        if has_torch_function((w, u, k, v, state, r, cu_seqlens)):
            arguments, options = (w, u, k, v, state), {"r": r, "cu_seqlens": cu_seqlens}
            return handle_torch_function(
                wkv, (*arguments, r, cu_seqlens), *arguments, **options, return_state=return_state, backend=backend
            )
    else:
        k, v, r = promoted(k, v, r)
        if type(k) is not Tensor:
            shardings.prepare(k)
    check(SEQUENCE, w, u, k, v, state, r, cu_seqlens)
    _check_boundaries(cu_seqlens, k)
    y, state_out = select(backend, k).forward(w, u, k, v, state, r, cu_seqlens)
    return (y, state_out) if return_state else y


def bi_wkv(
    log_decay: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The bidirectional WKV operator of Vision-RWKV: for each channel, a softmax-weighted mean of all steps' values.

    y_t = (Σ_{s≠t} e^{(|t-s|-1)·log_decay + k_s} v_s + e^{u+k_t} v_t) / (the same sum without v).

    Args:
        log_decay: [C], any floating dtype: the log-decay per step itself, and not the raw decay of `wkv`, of either
            sign. Where it is positive, weights grow with the distance. It counts as ±e^64 beyond.
        u: [C], any floating dtype: the bonus of the present token, a logit.
        k, v: [B, T, C], float32, float16, bfloat16 or float64, both the same: keys (logits) and values. Under
            autocast they may differ, and the wider dtype is used.
        r: [B, T, C] in k's dtype, the receptance before its sigmoid, which gates y, or None.
        cu_seqlens: [N + 1], int32 or int64, on k's device, or None: N sequences that are packed into one row, as for
            `wkv`.
        backend: "auto", or a name from `backends()`.

    Returns:
        y [B, T, C] in k's dtype, with r sigmoid(r)·y. All sums are float32, or float64 for float64 inputs.

    The logits are known to the rounding of their size, |k| + |u| + T·|log_decay|, and the results accordingly; nothing
    overflows. Sequences may lie in memory with any strides of B and T; channels that are not contiguous are copied.

    Differentiable in log_decay, u, k, v and r.

    Raises:
        As `wkv`.

    Source: Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures (arXiv 2403.02308).
    """
    if not isinstance(k, Tensor) or not isinstance(v, Tensor):
        if has_torch_function((log_decay, u, k, v, r, cu_seqlens)):
            arguments = (log_decay, u, k, v)
            return handle_torch_function(
                bi_wkv, (*arguments, r, cu_seqlens), *arguments, r=r, cu_seqlens=cu_seqlens, backend=backend
            )
    else:
        k, v, r = promoted(k, v, r)
        if type(k) is not Tensor:
            shardings.prepare(k)
    check(SEQUENCE, log_decay, u, k, v, None, r, cu_seqlens, decay="log_decay")
    _check_boundaries(cu_seqlens, k)
    forward = select(backend, k, "bi_wkv").bi_forward
    assert forward is not None
    return forward(log_decay, u, k, v, r, cu_seqlens)


def _check_boundaries(cu_seqlens: Tensor | None, k: Tensor) -> None:
    """Where they can be read without a wait."""
    if cu_seqlens is not None and untraced() and type(cu_seqlens) is Tensor and cu_seqlens.device.type == "cpu":
        check_boundaries(cu_seqlens, k.shape[1])


def promoted(k: Tensor, v: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast in the widest of their dtypes, otherwise as they are."""
    if k.dtype == v.dtype and (r is None or not isinstance(r, Tensor) or r.dtype == k.dtype):
        return k, v, r
    if not torch.is_autocast_enabled(k.device.type):
        return k, v, r
    dtype = torch.promote_types(k.dtype, v.dtype)
    if isinstance(r, Tensor):
        dtype = torch.promote_types(dtype, r.dtype)
        r = r.to(dtype)
    return k.to(dtype), v.to(dtype), r


def _step_by_forward(
    forward: Forward, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None
) -> Tensor:
    """A step as a sequence of one token, whose only mutation is a copy to the state."""
    # In the dtype of the sums, so that the gated result is rounded once.
    wide_k, wide_v, wide_r = (None if x is None else x.unsqueeze(1).to(state.dtype) for x in (k, v, r))
    y, state_out = forward(w, u, wide_k, wide_v, state, wide_r, None)
    state.copy_(state_out)
    return y.squeeze(1).to(k.dtype)


def wkv_step(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    r: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `wkv`, for decoding: the state moves on in place.

    Args:
        w, u: [C], as for `wkv`.
        k, v: [B, C], the token's keys and values. Under autocast k, v and r may differ, and the widest dtype is used.
        state: [B, 3, C], (num, den, max), overwritten by the state after the token.
        r: [B, C] in k's dtype, the token's receptance before its sigmoid, or None. It does not touch the state.
        backend: "auto", or a name from `backends()`.

    Returns:
        [B, C] in k's dtype: y, or with r sigmoid(r)·y, which is computed in the state's dtype and rounded once.

    Not differentiable: call it under torch.no_grad(), or use `wkv` with T = 1. Under torch.compile it may be given any
    view of a larger state, as in eager mode; `torch.ops.rwkv_kernels.wkv_step` itself may not.

    Raises:
        ValueError: also if a gradient would be required, or if elements of `state` share memory.
        TypeError, BackendUnavailable: as for `wkv`. The state is untouched after any of these.
    """
    if not isinstance(k, Tensor) or not isinstance(v, Tensor):
        if has_torch_function((w, u, k, v, state, r)):
            arguments = (w, u, k, v, state)
            return handle_torch_function(wkv_step, (*arguments, r), *arguments, r=r, backend=backend)
    else:
        k, v, r = promoted(k, v, r)
    if state is None:
        raise TypeError("state: expected a torch.Tensor, got NoneType")
    if type(k) is not Tensor:
        shardings.prepare(k)
    check(TOKEN, w, u, k, v, state, r)
    if torch.is_grad_enabled():
        for name, tensor in (("w", w), ("u", u), ("k", k), ("v", v), ("state", state), ("r", r)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient to be required by wkv_step (use torch.no_grad(), or wkv with "
                    "T = 1), got requires_grad=True"
                )
    if not state.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True)
    ):
        raise ValueError("state: expected elements of their own to write to, got an expanded tensor")
    chosen = select(backend, k)
    if chosen.step is None or is_compiling():
        # torch.compile loses the symbolic storage offset of a view that a custom operator mutates, and would write to
        # another place of the base. A copy from a functional operator is torch's own mutation, which it keeps right.
        return _step_by_forward(chosen.forward, w, u, k, v, state, r)
    refuse_onnx()
    return chosen.step(w, u, k, v, state, r)


def empty_state(
    batch: int,
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The state before the first step, [batch, 3, channels]: (num, den, max) = (0, 0, -1e38).

    `dtype` is that of the state: float32, or float64 for float64 inputs; TypeError for another.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    sums = torch.zeros((batch, 2, channels), device=device, dtype=dtype)
    # Nothing is written to afterwards: compilers that recompute a part of a graph recompute no mutation.
    return torch.cat((sums, torch.full_like(sums[:, :1], reference.EMPTY_MAX)), 1)
