"""The operator's arguments: their order, the schemas of its three forms, and the one table of what fits.

csrc/ops.cpp has the same schemas for a C++ program, csrc/common/checks.h the checks of a direct call there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import state_dtype

__all__ = [
    "BACKWARD",
    "DTYPES",
    "FORWARD",
    "SEQUENCE",
    "STATE",
    "STEP",
    "TOKEN",
    "Inputs",
    "check",
    "check_like",
    "either",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Inputs(NamedTuple):
    """The tensors of a call, in the order of every function and operator that takes them."""

    w: Tensor  # [C], the raw decay
    u: Tensor  # [C]
    k: Tensor  # [B, T, C]
    v: Tensor
    state: Tensor | None  # [B, 3, C], None for the empty one

    def all_present(self, sums: Tensor) -> Sequence[Tensor]:
        """With tensors for absent inputs, whose gradients backward returns too; `sums` has the dtype of sums."""
        B, _, C = self.k.shape
        return self.w, self.u, self.k, self.v, sums.new_empty((B, 3, C))


_INPUTS = "Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state"
# checkpoints [B, n, 3, C] are the states that backward replays from; n = 0 without `checkpoint`.
FORWARD = f"({_INPUTS}, bool checkpoint) -> (Tensor y, Tensor state_out, Tensor checkpoints)"
BACKWARD = (
    f"({_INPUTS}, Tensor checkpoints, Tensor gy, Tensor? gstate_out) "
    "-> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate)"
)
# One token, k, v and r [B, C]; the state moves on in place.
STEP = "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) state, Tensor? r=None) -> Tensor y"

SEQUENCE, TOKEN, PARAMETER, STATE = ("B", "T", "C"), ("B", "C"), ("C",), ("B", 3, "C")

# Name, tensor, axes, and the shape and dtypes that fit.
Row = tuple[str, Tensor, Sequence[str | int], Sequence[int], tuple[torch.dtype, ...]]


def check(
    axes: tuple[str, ...], w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, r: Tensor | None = None
) -> None:
    """Raises ValueError or TypeError for the first argument that does not fit; k has `axes`, SEQUENCE or TOKEN."""
    try:
        size, dtype = k.shape, k.dtype
    except AttributeError:
        raise _not_a_tensor("k", k) from None
    if len(size) != len(axes) or dtype not in DTYPES:
        raise _misfit_of_k(k, axes)
    of_k, C = (dtype,), size[-1:]
    rows: tuple[Row, ...] = ("v", v, axes, size, of_k), ("w", w, PARAMETER, C, DTYPES), ("u", u, PARAMETER, C, DTYPES)
    if r is not None:
        rows += (("r", r, axes, size, of_k),)
    if state is not None:
        rows += (("state", state, STATE, (size[0], 3, size[-1]), (state_dtype(dtype),)),)
    check_like(k, rows)


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
    of_state = axes == STATE
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
