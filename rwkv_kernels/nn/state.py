"""The model's memory between two calls, to be kept, restored and branched."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .files import read_torch

__all__ = ["RWKVState"]


class RWKVState(NamedTuple):
    """The model's memory between two calls; for a single block, without the leading L.

    Attributes:
        att_shift, ffn_shift: [L, B, C], the last input of every time mixing and channel mixing.
        wkv: [L, B, 3, C], float32, or float64 for a float64 model: the states of `rwkv_kernels.wkv`.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor

    def take(self, sequences: Sequence[int] | Tensor) -> "RWKVState":
        """Copies of the named sequences' states, in that order: `take([0] * 8)` branches the first one eightfold."""
        index = torch.as_tensor(sequences, dtype=torch.int64, device=self.wkv.device)
        return RWKVState(*(tensor.index_select(1, index) for tensor in self))

    @staticmethod
    def cat(states: Sequence["RWKVState"]) -> "RWKVState":
        """The states of several batches as one batch."""
        return RWKVState(*(torch.cat(tensors, 1) for tensors in zip(*states, strict=True)))

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "RWKVState":
        """The state of a model on that device, of that dtype; as `Tensor.to`, also by one argument.

        `wkv` becomes float64 for float64 and float32 for any other dtype, as in such a model.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        dtypes = (dtype, dtype, None if dtype is None else torch.promote_types(dtype, torch.float32))
        return RWKVState(
            *(x.to(device=device, dtype=to, non_blocking=non_blocking) for x, to in zip(self, dtypes, strict=True))
        )

    def detach(self) -> "RWKVState":
        """The same tensors without their history, as truncated backpropagation through time needs them."""
        return RWKVState(*(tensor.detach() for tensor in self))

    def clone(self) -> "RWKVState":
        """A copy, which `RWKV.step` may move on while this one stays; differentiable."""
        return RWKVState(*(tensor.clone() for tensor in self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads, whatever model it is for."""
        torch.save(self.detach().clone()._asdict(), path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "RWKVState":
        """A state that `save` wrote, on the CPU; ValueError for another or a broken file. Executes nothing of it."""
        tensors = read_torch(path)
        if set(tensors) != set(RWKVState._fields):
            raise ValueError(f"{path}: expected the tensors {', '.join(RWKVState._fields)}, got {sorted(tensors)[:5]}")
        return RWKVState(**tensors)


# torch.export saves and AOTInductor packages programs that take or return a state, and torch.load reads one with
# weights_only=True. torch has no public function that registers a named tuple.
torch.utils._pytree._register_namedtuple(RWKVState, serialized_type_name="rwkv_kernels.nn.RWKVState")
torch.serialization.add_safe_globals([RWKVState])
