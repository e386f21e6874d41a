"""flash-linear-attention's `fused_recurrent_rwkv4`.

    from rwkv_kernels.compat.fla import fused_recurrent_rwkv4

instead of `from fla.ops.rwkv4 import fused_recurrent_rwkv4`. Original: fla-core 0.6.0. Its decay is raw
(`log_decay = -exp(w)`), its state [B, 3, 1, C], and every call needs one.

Deliberate differences:

- The returned state is float32 (float64 for float64 inputs), where the original returns it, and saves every step of it
  for backward, in k's dtype. A state of any floating dtype is taken.
- The gradient of `max` in the state follows from those of num and den, as `rwkv_kernels.wkv` says.
- The CPU works.
"""

import torch
from torch import Tensor

from ..functional import wkv

__all__ = ["export_state", "fused_recurrent_rwkv4", "import_state"]


def import_state(state: Tensor) -> Tensor:
    """[B, 3, 1, C] -> [B, 3, C], the layout of `rwkv_kernels.wkv`; differentiable."""
    if state.dim() != 4 or state.shape[1:3] != (3, 1):
        raise ValueError(f"state: expected shape [B, 3, 1, C], got {list(state.shape)}")
    return state.squeeze(2)


def export_state(state: Tensor) -> Tensor:
    """[B, 3, C] -> [B, 3, 1, C]; differentiable."""
    if state.dim() != 3 or state.shape[1] != 3:
        raise ValueError(f"state: expected shape [B, 3, C], got {list(state.shape)}")
    return state.unsqueeze(2)


def fused_recurrent_rwkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The operator from a given state.

    Args:
        w, u: [C], any floating dtype, the raw decay and the bonus.
        k, v: [B, T, C], of one dtype.
        state: [B, 3, 1, C], any floating dtype: num, den and max.

    Returns:
        wkv [B, T, C] in k's dtype, and the state after it [B, 3, 1, C].

    Differentiable in all of them, the returned state included. Raises as `rwkv_kernels.wkv`, and ValueError for a state
    of another layout.
    """
    given = import_state(state).to(torch.promote_types(k.dtype, torch.float32))
    y, after = wkv(w, u, k, v, given, return_state=True)
    return y, export_state(after)
