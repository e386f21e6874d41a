"""RWKV-LM's `RUN_CUDA` and `WKV`, and the state of its recurrent mode.

    from rwkv_kernels.compat.blinkdl import RUN_CUDA

instead of the definitions in `src/model.py`, their compilation included. Original: RWKV-LM, RWKV-v4neo, `src/model.py`
and `src/model_run.py`. Its decay is raw (`log_decay = -exp(w)`), and so is the gradient of it.

Deliberate differences:

- T is not limited, B·C need not be a multiple of 32, and nothing is compiled at import.
- Tensors stay on their device, where the original moves them to the current GPU; the CPU works.
- bfloat16: y is not read back rounded in backward, and gw and gu are summed over the batch in float32.
- Without the environment variable RWKV_FLOAT_MODE, which the original needs, y has k's dtype.
"""

import os

import torch
from torch import Tensor

from ..functional import wkv
from ..nn import RWKVState

__all__ = ["RUN_CUDA", "WKV", "export_model_state", "import_model_state"]

OUTPUT_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def RUN_CUDA(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator from an empty state.

    Args:
        B, T, C: The shape of k.
        w, u: [C], any floating dtype, the raw decay and the bonus.
        k, v: [B, T, C], of one dtype.

    Returns:
        y [B, T, C], in the dtype of RWKV_FLOAT_MODE (fp32, tf32, fp16, bf16) if that is set, else in k's.

    Differentiable in w, u, k and v.

    Raises:
        ValueError: k has another shape than B, T, C. Otherwise as `rwkv_kernels.wkv`.
    """
    if list(k.shape) != [B, T, C]:
        raise ValueError(f"k: expected shape [B, T, C] = {[B, T, C]}, got {list(k.shape)}")
    return wkv(w, u, k, v).to(OUTPUT_DTYPES.get(os.environ.get("RWKV_FLOAT_MODE", ""), k.dtype))


class WKV:
    """The original's autograd function, by its one use: `WKV.apply(B, T, C, w, u, k, v)`."""

    apply = staticmethod(RUN_CUDA)


def import_model_state(state: Tensor) -> RWKVState:
    """RWKV_RNN's state, [5 L, C], for each layer the rows ffn, att, num, den, max -> `nn.RWKVState` of one sequence."""
    if state.dim() != 2 or state.shape[0] % 5:
        raise ValueError(f"state: expected shape [5 L, C] as RWKV_RNN returns it, got {list(state.shape)}")
    ffn, att, num, den, top = state.unflatten(0, (-1, 5)).unbind(1)
    return RWKVState(att.unsqueeze(1), ffn.unsqueeze(1), torch.stack((num, den, top), 1).unsqueeze(1))


def export_model_state(state: RWKVState) -> Tensor:
    """`nn.RWKVState` of one sequence -> RWKV_RNN's state, [5 L, C]; ValueError for several sequences."""
    if state.wkv.shape[1] != 1:
        raise ValueError(f"state: expected one sequence, got {state.wkv.shape[1]}; RWKVState.take picks one")
    rows = (state.ffn_shift, state.att_shift, *state.wkv.unbind(2))
    return torch.stack([row[:, 0].to(state.wkv.dtype) for row in rows], 1).flatten(0, 1)
