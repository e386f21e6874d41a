"""RWKV-infctx-trainer's operator with a state, and the state of its model.

    from rwkv_kernels.compat.infctx import wkv

instead of `torch.ops.rwkv.wkv`, its compilation included. Original: RWKV-infctx-trainer, RWKV-v4neo,
`cuda/wkv_op_bf16.cpp` and `src/model.py`. Its decay is raw (`log_decay = -exp(w)`), its WKV state [B, C, 3]: num, den
and max innermost.

Deliberate differences:

- Every floating dtype works, not bfloat16 alone; the CPU works; T is not limited, B·C need not be a multiple of 32.
- gw and gu are summed over the batch in float32, and returned in the dtypes of w and u.
- The gradient of `max` in the state follows from those of num and den, as `rwkv_kernels.wkv` says.
"""

import torch
from torch import Tensor

from ..nn import RWKVState
from .torchscript import wkv_with_state

__all__ = ["export_model_state", "export_state", "import_model_state", "import_state", "wkv"]


def import_state(state: Tensor) -> Tensor:
    """[..., C, 3] -> [..., 3, C], the layout of `rwkv_kernels.wkv`; differentiable."""
    if state.shape[-1] != 3:
        raise ValueError(f"state: expected shape [B, C, 3], got {list(state.shape)}")
    return state.transpose(-1, -2).contiguous()


def export_state(state: Tensor) -> Tensor:
    """[..., 3, C] -> [..., C, 3]; differentiable."""
    if state.shape[-2] != 3:
        raise ValueError(f"state: expected shape [B, 3, C], got {list(state.shape)}")
    return state.transpose(-1, -2).contiguous()


def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, last_state: Tensor) -> list[Tensor]:
    """The operator from a given state.

    Args:
        w, u: [C], any floating dtype, the raw decay and the bonus.
        k, v: [B, T, C], of one dtype.
        last_state: [B, C, 3], float32, or float64 for float64 k; its empty values are (0, 0, -1e38).

    Returns:
        [y [B, T, C] in k's dtype, new_state [B, C, 3]].

    Differentiable in all of them, the returned state included. TorchScript may call it, as the original's modules do;
    errors are then torch.jit.Error or RuntimeError with the same text. Raises as `rwkv_kernels.wkv`, and ValueError for
    a state of another layout.
    """
    y, state = wkv_with_state(w, u, k, v, import_state(last_state))
    return [y, export_state(state)]


def import_model_state(shift_states: Tensor, wkv_states: Tensor) -> RWKVState:
    """The two tensors of a BlockStateList, [L, 2, B, C] (att, ffn) and [L, B, C, 3] -> `nn.RWKVState`."""
    if shift_states.dim() != 4 or shift_states.shape[1] != 2:
        raise ValueError(f"shift_states: expected shape [L, 2, B, C], got {list(shift_states.shape)}")
    att, ffn = shift_states.unbind(1)
    return RWKVState(att, ffn, import_state(wkv_states))


def export_model_state(state: RWKVState) -> tuple[Tensor, Tensor]:
    """`nn.RWKVState` -> shift_states and wkv_states, for `BlockStateList(shift_states, wkv_states)`."""
    return torch.stack((state.att_shift, state.ffn_shift), 1), export_state(state.wkv)
