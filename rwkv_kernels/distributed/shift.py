"""The token shift over sequences whose steps are spread over the ranks of a group."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import DTYPES, SEQUENCE, TOKEN, Row, check_like
from .ranks import Group, Ranks, Slices, refuse_subclasses

__all__ = ["sliced_shift", "token_shift"]


class _LastTokens(torch.autograd.Function):
    """The token before this rank's first, and the last one of all ranks, [B, C], from each rank's last one.

    On the first rank the former is what it is given: every rank uses a result, so that backward reaches every rank.
    """

    @staticmethod
    def forward(
        ctx: Any, _: Tensor | None, slices: Slices, return_last: bool, first: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        gathered, wait = slices.all_gather(own)
        wait()
        ctx.slices, ctx.return_last = slices, return_last
        ctx.set_materialize_grads(False)
        # Copies, because a view would keep all ranks' tokens.
        before = (first if slices.is_first else gathered[_source(slices, slices.rank)]).clone()
        return before, gathered[_source(slices, len(gathered))].clone() if return_last else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gbefore: Tensor | None, glast: Tensor | None) -> Any:
        slices: Slices = ctx.slices
        given = glast if gbefore is None else gbefore
        assert given is not None  # or autograd would not have called
        zero = torch.zeros_like(given)
        gbefore = zero if gbefore is None else gbefore
        glast = zero if glast is None else glast
        gathered, wait = slices.all_gather(torch.stack((gbefore, glast)) if ctx.return_last else gbefore.unsqueeze(0))
        wait()
        ranks = len(slices.steps)
        gown = [gathered[j, 0] for j in range(1, ranks) if _source(slices, j) == slices.rank]
        if ctx.return_last and _source(slices, ranks) == slices.rank:
            gown.append(gathered[:, 1].sum(0))
        return None, None, None, gbefore if slices.is_first else None, sum(gown, start=zero)


def _source(slices: Slices, rank: int) -> int:
    """The rank that has the token before a rank's first, or before the end: the nearest with steps, or the first."""
    return max((i for i in range(rank) if slices.steps[i] > 0), default=0)


def sliced_shift(slices: Slices, x: Tensor, before: Tensor | None, return_last: bool) -> tuple[Tensor, Tensor | None]:
    """`token_shift` between ranks that agreed."""
    first = x.new_zeros(x.shape[0], x.shape[2]) if before is None else before.to(x.dtype)
    # Without steps it depends on x all the same, so that backward with `inputs=` reaches this rank as it does others.
    own = (x if x.shape[1] > 0 else torch.cat((first.unsqueeze(1), x), 1))[:, -1]
    first, last = _LastTokens.apply(slices.anchor, slices, return_last, first, own)  # type: ignore[no-untyped-call]
    return torch.cat((first.unsqueeze(1), x), 1)[:, :-1], last


@overload
def token_shift(
    x: Tensor, before: Tensor | None = None, *, group: Group = None, return_last: Literal[False] = False
) -> Tensor: ...


@overload
def token_shift(
    x: Tensor, before: Tensor | None = None, *, group: Group = None, return_last: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def token_shift(
    x: Tensor, before: Tensor | None = None, *, group: Group = None, return_last: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Every token's predecessor, across ranks: that of a rank's first token is the last one of the rank before.

    Args:
        x: [B, T, C], this rank's steps, as for `wkv`.
        before: [B, C], the token before the first rank's first, or None for zeros; not looked at on other ranks.
        group: A process group, or a mesh of one dimension; all processes by default.
        return_last: Also return the last token of all ranks [B, C], on every rank: the next call's `before`.

    Returns:
        [B, T, C], or that and the last token. Differentiable; backward is a collective, as that of `wkv` is.

    Raises:
        RuntimeError, ValueError, TypeError: as for `wkv`.
    """
    ranks = Ranks.of(group)
    misfit: Exception | None = None
    try:
        refuse_subclasses(x=x, before=before)
        if x.dim() != 3:
            raise ValueError(f"x: expected shape [B, T, C], got {list(x.shape)}")
        rows: list[Row] = [("x", x, SEQUENCE, x.shape, DTYPES)]
        if before is not None:
            rows.append(("before", before, TOKEN, (x.shape[0], x.shape[2]), DTYPES))
        check_like(x, rows)
    except (TypeError, ValueError) as error:
        misfit = error
    slices = ranks.agree("token_shift", x, (x, before), return_last, misfit)
    previous, last = sliced_shift(slices, x, before, return_last)
    return previous if last is None else (previous, last)
