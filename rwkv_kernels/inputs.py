"""The operator's arguments: their order, the schemas of its forms, and the one table of what fits.

csrc/ops.cpp has the same schemas for a C++ program, csrc/common/checks.h the checks of a direct call there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import state_dtype

__all__ = [
    "ADJOINT_SUMMARY",
    "BACKWARD",
    "BI_BACKWARD",
    "BI_FORWARD",
    "BOUNDARY_DTYPES",
    "DTYPES",
    "FORWARD",
    "MIXING_BACKWARD",
    "MIXING_FORWARD",
    "SEQUENCE",
    "STATE",
    "STEP",
    "SUMMARY",
    "TOKEN",
    "BiInputs",
    "Inputs",
    "check",
    "check_boundaries",
    "check_like",
    "either",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _sequences(k: Tensor, cu_seqlens: Tensor | None) -> int:
    """N."""
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _checkpoints(k: Tensor, cu_seqlens: Tensor | None, interval: int) -> int:
    """The checkpoints of a row of k.

    A packed sequence n has those from cu_seqlens[n] // interval + n on, as many as it would have alone.
    """
    T = k.shape[1]
    return (T + interval - 1) // interval if cu_seqlens is None else T // interval + _sequences(k, cu_seqlens)


class Inputs(NamedTuple):
    """The tensors of a call of wkv, in the order of every function and operator that takes them.

    The plain operators take the first five, the mixing ones all.
    """

    w: Tensor  # [C], the raw decay
    u: Tensor  # [C]
    k: Tensor  # [B, T, C]
    v: Tensor
    state: Tensor | None  # [N, 3, C], None for the empty one; N = B, or the number of packed sequences
    r: Tensor | None = None  # [B, T, C]: y is gated by its sigmoid
    cu_seqlens: Tensor | None = None  # [N + 1], of sequences packed into B = 1

    @property
    def sequences(self) -> int:
        """N."""
        return _sequences(self.k, self.cu_seqlens)

    def checkpoint_shape(self, interval: int) -> tuple[int, ...]:
        """Of the states that backward replays from, each after an interval."""
        B, _, C = self.k.shape
        return B, _checkpoints(self.k, self.cu_seqlens, interval), 3, C

    def results(self, sums: Tensor) -> Sequence[Tensor]:
        """Tensors of the shapes of forward's results; `sums` has the dtype of sums."""
        return self.k, sums.new_empty((self.sequences, 3, self.k.shape[-1]))

    def gradients(self, sums: Tensor) -> Sequence[Tensor]:
        """Tensors of the shapes of backward's results, of absent inputs too; `sums` has the dtype of sums."""
        k, C = self.k, self.k.shape[-1]
        gr = k[:, :0] if self.r is None else k
        return self.w, self.u, k, self.v, sums.new_empty((self.sequences, 3, C)), gr


class BiInputs(NamedTuple):
    """The tensors of a call of bi_wkv, as Inputs has those of wkv."""

    log_decay: Tensor  # [C], of either sign
    u: Tensor  # [C]
    k: Tensor  # [B, T, C]
    v: Tensor
    r: Tensor | None = None  # [B, T, C]: y is gated by its sigmoid
    cu_seqlens: Tensor | None = None  # [N + 1], of sequences packed into B = 1

    @property
    def sequences(self) -> int:
        """N."""
        return _sequences(self.k, self.cu_seqlens)

    def checkpoint_shape(self, interval: int) -> tuple[int, ...]:
        """Of the states that backward replays from, those before and after each interval."""
        B, _, C = self.k.shape
        return B, _checkpoints(self.k, self.cu_seqlens, interval), 6, C

    def results(self, sums: Tensor) -> Sequence[Tensor]:
        """Tensors of the shapes of forward's results."""
        return (self.k,)

    def gradients(self, sums: Tensor) -> Sequence[Tensor]:
        """Tensors of the shapes of backward's results, of absent inputs too."""
        k = self.k
        return self.log_decay, self.u, k, self.v, k[:, :0] if self.r is None else k


_INPUTS = "Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state"
# checkpoints [B, n, 3, C] are the states that backward replays from; n = 0 without `checkpoint`.
FORWARD = f"({_INPUTS}, bool checkpoint) -> (Tensor y, Tensor state_out, Tensor checkpoints)"
BACKWARD = (
    f"({_INPUTS}, Tensor checkpoints, Tensor gy, Tensor? gstate_out) "
    "-> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate)"
)
# The same with a gate, for packed sequences or both: y = sigmoid(r) * wkv. gr is [B, 0, C] without r.
_MIXING = f"{_INPUTS}, Tensor? r, Tensor? cu_seqlens"
MIXING_FORWARD = f"({_MIXING}, bool checkpoint) -> (Tensor y, Tensor state_out, Tensor checkpoints)"
MIXING_BACKWARD = (
    f"({_MIXING}, Tensor checkpoints, Tensor gy, Tensor? gstate_out) "
    "-> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate, Tensor gr)"
)
# Summaries of a slice of a sequence: the state that its steps leave behind an empty one, and the adjoint [B, 2, C]
# before them where that after them is zero.
SUMMARY = "(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor state"
ADJOINT_SUMMARY = f"({_INPUTS}, Tensor? r, Tensor checkpoints, Tensor gy) -> Tensor adjoint"
# Bidirectional, with the same gate and packing; checkpoints [B, n, 6, C] are the states before and after each interval.
_BI = "Tensor log_decay, Tensor u, Tensor k, Tensor v, Tensor? r, Tensor? cu_seqlens"
BI_FORWARD = f"({_BI}, bool checkpoint) -> (Tensor y, Tensor checkpoints)"
BI_BACKWARD = (
    f"({_BI}, Tensor checkpoints, Tensor gy) -> (Tensor g_log_decay, Tensor gu, Tensor gk, Tensor gv, Tensor gr)"
)
# One token, k, v and r [B, C]; the state moves on in place.
STEP = "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) state, Tensor? r=None) -> Tensor y"

SEQUENCE, TOKEN, PARAMETER, STATE = ("B", "T", "C"), ("B", "C"), ("C",), ("B", 3, "C")
PACKED_STATE, BOUNDARIES = ("N", 3, "C"), ("N + 1",)
BOUNDARY_DTYPES = (torch.int32, torch.int64)

# Name, tensor, axes, and the shape and dtypes that fit.
Row = tuple[str, Tensor, Sequence[str | int], Sequence[int], tuple[torch.dtype, ...]]


def check(
    axes: tuple[str, ...],
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    decay: str = "w",
) -> None:
    """Raises ValueError or TypeError for the first argument that does not fit; k has `axes`, SEQUENCE or TOKEN.

    Of cu_seqlens it reads no element: `check_boundaries` does. `decay` is the name of the first argument.
    """
    try:
        size, dtype = k.shape, k.dtype
    except AttributeError:
        raise _not_a_tensor("k", k) from None
    if len(size) != len(axes) or dtype not in DTYPES:
        raise _misfit_of_k(k, axes)
    of_k, C = (dtype,), size[-1:]
    rows: tuple[Row, ...] = ("v", v, axes, size, of_k), (decay, w, PARAMETER, C, DTYPES), ("u", u, PARAMETER, C, DTYPES)
    if r is not None:
        rows += (("r", r, axes, size, of_k),)
    of_state: tuple[str | int, ...] = STATE
    sequences = size[0]
    if cu_seqlens is not None:
        of_state, sequences = PACKED_STATE, _packed_sequences(k, cu_seqlens)
        rows += (("cu_seqlens", cu_seqlens, BOUNDARIES, cu_seqlens.shape, BOUNDARY_DTYPES),)
    if state is not None:
        rows += (("state", state, of_state, (sequences, 3, size[-1]), (state_dtype(dtype),)),)
    check_like(k, rows)


def _packed_sequences(k: Tensor, cu_seqlens: Tensor) -> int:
    """N."""
    if not isinstance(cu_seqlens, Tensor):
        raise _not_a_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {list(cu_seqlens.shape)}")
    if k.shape[0] != 1:
        raise ValueError(f"k: expected shape [1, total, C] with cu_seqlens, got {list(k.shape)}")
    return cu_seqlens.shape[0] - 1


def check_boundaries(cu_seqlens: Tensor, total: int) -> None:
    """Raises ValueError unless the boundaries rise from 0 to the total; reads them on the host."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {first}")
    if last != total:
        raise ValueError(f"cu_seqlens: expected to end at {total}, the number of steps of k, got {last}")
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        n = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_seqlens: expected to rise, got {int(cu_seqlens[n + 1])} after {int(cu_seqlens[n])} at {n + 1}"
        )


def check_like(k: Tensor, rows: Sequence[Row]) -> None:
    """Raises ValueError or TypeError for the first tensor without its shape, one of its dtypes, or k's device."""
    device = k.device
    for name, tensor, axes, shape, dtypes in rows:
        try:
            if tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device:
                continue
        except AttributeError:
            pass
        raise _misfit(k, name, tensor, axes, shape, dtypes)


def _misfit_of_k(k: Tensor, axes: Sequence[str]) -> Exception:
    if not isinstance(k, Tensor):
        return _not_a_tensor("k", k)
    if len(k.shape) != len(axes):
        return ValueError(f"k: expected shape {_brackets(axes)}, got {list(k.shape)}")
    return TypeError(f"k: expected {either(DTYPES)}, got {k.dtype}")


def _misfit(
    k: Tensor, name: str, tensor: Tensor, axes: Sequence[str | int], shape: Sequence[int], dtypes: Sequence[torch.dtype]
) -> Exception:
    if not isinstance(tensor, Tensor):
        return _not_a_tensor(name, tensor)
    of_state = axes in (STATE, PACKED_STATE)
    if tensor.shape != shape:
        as_k = " as k" if shape == k.shape and not of_state else ""
        converter = _converter(tensor, *shape) if of_state else ""
        return ValueError(
            f"{name}: expected shape {_brackets(axes)} = {list(shape)}{as_k}, got {list(tensor.shape)}{converter}"
        )
    if tensor.dtype not in dtypes:
        of_k = f"for k of {k.dtype}" if of_state else "as k"
        expected = either(dtypes) if len(dtypes) > 1 else f"{dtypes[0]} {of_k}"
        return TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    return ValueError(f"{name}: expected device {k.device} as k, got {tensor.device}")


def _not_a_tensor(name: str, value: object) -> TypeError:
    if name == "state" and isinstance(value, (list, tuple)):
        return TypeError(
            f"state: expected a torch.Tensor [B, 3, C], got a {type(value).__name__}; "
            "rwkv_kernels.compat.transformers.import_state converts [num, den, max]"
        )
    return TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _converter(state: Tensor, B: int, _: int, C: int) -> str:
    """The function that converts a state of other code, where this one has its shape."""
    origin = {(B, C, 3): "infctx", (B, 3, 1, C): "fla"}.get(tuple(state.shape))
    return f"; rwkv_kernels.compat.{origin}.import_state converts it" if origin else ""


def _brackets(axes: Sequence[str | int]) -> str:
    return f"[{', '.join(map(str, axes))}]"


def either(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes in words."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}"
