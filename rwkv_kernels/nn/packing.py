"""Sequences of different length in one call, each as if it ran alone: packed, one after the other, without padding.

A step that does not count cannot be written as a key: it would age the state. So a padded batch is packed, too, and its
padding becomes one sequence more, whose results are dropped.

Shapes follow from shapes and nothing is read on the host: a compiler makes one graph for all lengths and masks, and a
CUDA graph may be replayed with others.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import RWKVState

__all__ = ["Packing", "Padding", "cu_seqlens_of"]


class Packing(NamedTuple):
    """Where N packed sequences start and end, computed once for all layers.

    A token shift looks into rows [N + total, C], the inputs before each sequence and then all tokens. Row N - 1 + t is
    the predecessor of token t, once each sequence's first token has the input before it there.

    Attributes:
        cu_seqlens: [N + 1], int32 or int64, as for `rwkv_kernels.wkv`.
        starts: [N], int64, the row of the predecessor of each first token; of an empty sequence, a row of no token's.
        ends: [N], int64, the row of each last token; of an empty sequence, of the input before it.
    """

    cu_seqlens: Tensor
    starts: Tensor
    ends: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, total: int) -> "Packing":
        """The places of sequences that have `total` tokens together."""
        # Within the tokens, so that a wrong number on a GPU, where nobody reads it, addresses nothing outside.
        places = cu_seqlens.to(torch.int64).clamp(0, total)
        start, end, N = places[:-1], places[1:], cu_seqlens.shape[0] - 1
        filled = end > start
        own = torch.arange(N, device=places.device)
        return Packing(cu_seqlens, torch.where(filled, start, total) + (N - 1), torch.where(filled, end + (N - 1), own))

    def shift(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """x [1, total, C], the inputs before it [N, C] -> each token's predecessor, and each sequence's last [N, C]."""
        N = before.shape[0]
        rows = torch.cat((before, x.squeeze(0)))
        last = rows.index_select(0, self.ends)
        rows.index_copy_(0, self.starts, before)
        return rows[N - 1 : N - 1 + x.shape[1]].unsqueeze(0), last

    def last(self, x: Tensor) -> Tensor:
        """[1, total, C] -> [N, 1, C], the last token of each sequence, zero for an empty one."""
        places = (self.ends - (self.ends.shape[0] - 1)).clamp(min=0)
        return F.pad(x, (0, 0, 1, 0)).index_select(1, places).transpose(0, 1)


class Padding(NamedTuple):
    """The way of a padded batch [B, T] into B + 1 packed sequences and back; the last one has the padding.

    Attributes:
        mask: [B, T], bool, the steps that count.
        places: [B·T], int64, the packed place of each step.
    """

    mask: Tensor
    places: Tensor
    packing: Packing

    @staticmethod
    def of(mask: Tensor) -> "Padding":
        """The steps that count in their order, and after them all others in theirs."""
        counts = mask.flatten()
        total = counts.shape[0]
        ends = F.pad(mask.sum(1).cumsum(0), (1, 0))
        counted, steps = counts.cumsum(0), torch.arange(total, device=mask.device)
        places = torch.where(counts, counted - 1, ends[-1] + steps - counted)
        cu_seqlens = torch.cat((ends, ends.new_full((1,), total)))
        return Padding(mask, places, Packing.of(cu_seqlens, total))

    def pack(self, x: Tensor) -> Tensor:
        """[B, T] -> [1, B·T], or [B, T, C] -> [1, B·T, C]. Padding becomes 0, so that it may be any number before."""
        mask = self.mask if x.dim() == 2 else self.mask.unsqueeze(2)
        flat = x.masked_fill(~mask, 0).flatten(0, 1)
        return torch.empty_like(flat).index_copy_(0, self.places, flat).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, B·T, C] -> [B, T, C], zero in the padding."""
        flat = x.squeeze(0).index_select(0, self.places)
        return flat.view(*self.mask.shape, x.shape[2]).masked_fill(~self.mask.unsqueeze(2), 0)

    def with_padding(self, state: RWKVState) -> RWKVState:
        """The state of a batch, with an empty one for the padding: zeros are one, as den = 0 makes it empty."""
        att_shift, ffn_shift, wkv = state
        one_more = (0, 0, 0, 1)
        return RWKVState(F.pad(att_shift, one_more), F.pad(ffn_shift, one_more), F.pad(wkv, (0, 0, *one_more)))


def cu_seqlens_of(batch: Mapping[str, Any]) -> Tensor:
    """The boundaries of packed sequences, from what comes with them in a batch.

    Args:
        batch: Tensors by the names that transformers' DataCollatorWithFlattening gives them. The first of these counts:
            `cu_seq_lens_q`, int32 [N + 1], the boundaries themselves;
            `seq_idx`, [1, total], the number of each token's sequence;
            `position_ids`, [1, total], which restart with every sequence, at any number.

    Returns:
        [N + 1], int32, the `cu_seqlens` of `RWKV.forward` and `rwkv_kernels.wkv`. In `seq_idx` and `position_ids`, the
        number of sequences is data: it is read on the host, which waits for a GPU, and empty sequences do not show.
        Nothing is read where `cu_seq_lens_q` is given.

    Raises:
        ValueError: the batch has none of these, or several rows.
    """
    if (given := batch.get("cu_seq_lens_q")) is not None:
        return given  # type: ignore[no-any-return]
    for name, step in (("seq_idx", 0), ("position_ids", 1)):
        if (numbers := batch.get(name)) is None:
            continue
        if numbers.dim() != 2 or numbers.shape[0] != 1:
            raise ValueError(f"{name}: expected shape [1, total], got {list(numbers.shape)}")
        (row,) = numbers
        inner = 1 + (row.diff() != step).nonzero().squeeze(1)
        return torch.cat((F.pad(inner, (1, 0)), inner.new_full((1,), row.shape[0]))).to(torch.int32)
    raise ValueError(
        "expected a batch with cu_seq_lens_q, seq_idx or position_ids, as DataCollatorWithFlattening makes it, got "
        f"{', '.join(batch) or 'an empty one'}"
    )
