"""`wkv` over sequences whose steps are spread over the ranks of a group.

Each rank has a slice of consecutive steps, of any length. Before its own steps it needs one state, and before their
derivative one adjoint: both follow from summaries, [B, 3, C] and [B, 2, C], that every rank computes of its own slice
and all-gathers.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional
from .._backends.registry import BackendUnavailable
from ..inputs import SEQUENCE, check
from . import summaries
from .operators import Operators
from .ranks import Group, Ranks, Slices, refuse_subclasses

__all__ = ["sliced_wkv", "wkv"]


class _Wkv(torch.autograd.Function):
    """Both passes of a slice; each has one all-gather, in which every rank takes part."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor | None, slices: Slices, operators: Operators, return_state: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        w, u, k, v, state, r = inputs
        assert w is not None and u is not None and k is not None and v is not None
        checkpoint = slices.anchor is not None
        rank, steps = slices.rank, slices.steps
        log_decay = summaries.log_decay_of(w, k.dtype)
        if slices.is_last and not return_state:
            own = functional.empty_state(k.shape[0], k.shape[2], device=k.device, dtype=log_decay.dtype)
        else:
            own = operators.summary(w, u, k, v)
        if slices.is_first and state is not None:
            parts = torch.stack((summaries.normal(state), own))
            lengths = (0, steps[0])
            own = summaries.join(parts, lengths, log_decay, summaries.running_maxima(parts, lengths, log_decay)[1])
        gathered, wait = slices.all_gather(own)
        if slices.is_first:
            # Needs no other rank's summary, so that it runs beside the collective.
            y, end, checkpoints = operators.forward(*inputs, checkpoint=checkpoint)
        wait()
        maxima = summaries.running_maxima(gathered, steps, log_decay)
        if not slices.is_first:
            state = summaries.join(gathered[:rank], steps[:rank], log_decay, maxima[rank - 1])
            y, end, checkpoints = operators.forward(w, u, k, v, state, r, checkpoint=checkpoint)
        final = summaries.join(gathered, steps, log_decay, maxima[-1]) if return_state else None
        if checkpoint:
            weights = summaries.adjoint_weights(maxima, steps, rank, log_decay)
            # Between the max of the joined state and that of the operator's own there may be a rounding.
            weights = weights * torch.exp(end[:, 2] - maxima[rank])
            ctx.save_for_backward(w, u, k, v, state, r, checkpoints, end, weights)
            ctx.slices, ctx.operators, ctx.return_state = slices, operators, return_state
            ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor | None, gfinal: Tensor | None) -> Any:
        *inputs, checkpoints, end, weights = ctx.saved_tensors
        slices: Slices = ctx.slices
        operators: Operators = ctx.operators
        k = inputs[2]
        gy = torch.zeros_like(k) if gy is None else gy
        told = end.new_zeros((2 if ctx.return_state else 1, k.shape[0], 2, k.shape[2]))
        if not slices.is_first:  # nobody is before it
            told[0] = operators.adjoint_summary(inputs, checkpoints, gy)
        if gfinal is not None:
            told[1] = gfinal[:, :2]
        gathered, wait = slices.all_gather(told)
        if slices.is_last and not ctx.return_state:
            # Nothing comes after it, so that it runs beside the collective.
            gradients = operators.backward(inputs, checkpoints, gy, None)
            wait()
        else:
            wait()
            later = [gathered[slices.rank + 1 :, 0]]
            if ctx.return_state:
                later.append(gathered[:, 1].sum(0, keepdim=True))
            known = torch.cat(later)
            adjoint = (weights[: len(known)].unsqueeze(2) * known).sum(0)
            gauge = (adjoint * end[:, :2]).sum(1, keepdim=True)
            gradients = operators.backward(inputs, checkpoints, gy, torch.cat((adjoint, gauge), 1))
        gw, gu, gk, gv, gstate, gr = gradients
        has_own_state = slices.is_first and inputs[4] is not None
        return None, None, None, None, gw, gu, gk, gv, gstate if has_own_state else None, gr


def sliced_wkv(
    slices: Slices,
    operators: Operators,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    r: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`wkv` of arguments that are checked, between ranks that agreed."""
    outputs: tuple[Tensor, Tensor | None] = _Wkv.apply(  # type: ignore[no-untyped-call]
        slices.anchor, slices, operators, return_state, w, u, k, v, state, r
    )
    return outputs


@overload
def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    r: Tensor | None = None,
    group: Group = None,
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
    group: Group = None,
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
    group: Group = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`rwkv_kernels.wkv` over sequences whose steps are spread over the ranks of a group, by every rank at once.

    Args:
        w, u: [C], the same on every rank.
        k, v: [B, T, C], this rank's steps, which follow those of the rank before; T may differ from rank to rank, and
            may be 0.
        state: [B, 3, C], the state before the first rank's steps, or None for the empty one. Other ranks' states are
            not looked at, so that the one returned can be passed on.
        r: [B, T, C], this rank's receptance, or None.
        group: A process group, or a mesh of one dimension; all processes by default.
        return_state: Also return the state after the last rank's steps, on every rank; the same on every rank.
        backend: As for `rwkv_kernels.wkv`; one that has operators: cpu, cuda or triton.

    Returns:
        y [B, T, C] of this rank's steps, or (y, state). Bitwise equal from run to run.

    Differentiable as `rwkv_kernels.wkv`. The gradients of k, v, r, and on the first rank of state, are complete. Those
    of w and u are this rank's share: their sum over the ranks is the gradient, which FSDP2 or DDP over the same ranks
    takes, as of every other parameter. Gradients that arrive at the returned state on several ranks are added. Backward
    is a collective: where one rank of the group runs it, all must, or those that do wait for the group's timeout.

    Raises:
        RuntimeError: there is no process group; or other ranks refused their arguments.
        ValueError: the ranks disagree on B, C, the dtype or return_state, on every rank, which it names.
        ValueError, TypeError, BackendUnavailable: as for `rwkv_kernels.wkv`; also for a DTensor.
    """
    ranks = Ranks.of(group)
    misfit: Exception | None = None
    operators = Operators("")
    try:
        refuse_subclasses(w=w, u=u, k=k, v=v, state=state, r=r)
        k, v, r = functional.promoted(k, v, r)
        check(SEQUENCE, w, u, k, v, state, r)
        operators = Operators.of(backend, k)
    except (TypeError, ValueError, BackendUnavailable) as error:
        misfit = error
    slices = ranks.agree("wkv", k, (w, u, k, v, state, r), return_state, misfit)
    y, final = sliced_wkv(slices, operators, w, u, k, v, state, r, return_state)
    return y if final is None else (y, final)
