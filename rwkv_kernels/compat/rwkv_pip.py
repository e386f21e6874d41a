"""The rwkv package's call over a sequence, and its model's list of states.

    from rwkv_kernels.compat.rwkv_pip import cuda_wkv

instead of `from rwkv.model import cuda_wkv`, which is there with RWKV_CUDA_ON=1 only, and compiles. Original: rwkv
0.8.32, `rwkv/model.py`. Its decay is **negative**: the log-decay itself, -exp(time_decay). Its state is three [C]
tensors aa, bb, pp (num, den, max) of one sequence.

Deliberate differences:

- C need not be a multiple of 32; bfloat16 and float64 work; the CPU works.

Inputs that require a gradient are constants, as in the original, which has no backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn import RWKVState
from .torchscript import wkv_with_state

__all__ = ["cuda_wkv", "export_model_state", "export_state", "import_model_state", "import_state"]


def import_state(aa: Tensor, bb: Tensor, pp: Tensor) -> Tensor:
    """num, den and max of one sequence, each [C] -> [1, 3, C], the layout of `rwkv_kernels.wkv`."""
    for name, tensor in (("aa", aa), ("bb", bb), ("pp", pp)):
        if tensor.dim() != 1:
            raise ValueError(f"{name}: expected shape [C], got {list(tensor.shape)}")
    return torch.stack((aa, bb, pp)).unsqueeze(0)


def export_state(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, 3, C] -> aa, bb, pp, each [C]."""
    if state.dim() != 3 or list(state.shape[:2]) != [1, 3]:
        raise ValueError(f"state: expected one sequence [1, 3, C], got {list(state.shape)}")
    aa, bb, pp = state[0].unbind()
    return aa, bb, pp


def cuda_wkv(
    T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator over one sequence; the state moves on in place.

    Args:
        T, C: The shape of k.
        w: [C], any floating dtype, at most 0: the log-decay itself. Above 0 everything becomes NaN.
        u: [C], any floating dtype, the bonus.
        k, v: [T, C], of one dtype.
        aa, bb, pp: [C], float32, or float64 for float64 k: the state, overwritten by the one after.

    Returns:
        y [T, C] in k's dtype, and the same aa, bb, pp.

    Not differentiable. TorchScript may call it, as the original's model does; errors are then torch.jit.Error or
    RuntimeError with the same text.

    Raises:
        ValueError: k has another shape than T, C, or the state another layout. Otherwise as `rwkv_kernels.wkv`.
    """
    if list(k.shape) != [T, C]:
        raise ValueError(f"k: expected shape [T, C] = {[T, C]}, got {list(k.shape)}")
    # A block and not a decorator, which TorchScript would not see.
    with torch.no_grad():
        # In float64, so that the way to the raw decay and back costs no rounding.
        raw = (-w.double()).log()
        y, state = wkv_with_state(raw, u, k.unsqueeze(0), v.unsqueeze(0), import_state(aa, bb, pp))
        num, den, top = export_state(state)
        aa.copy_(num)
        bb.copy_(den)
        pp.copy_(top)
        return y.squeeze(0), aa, bb, pp


def import_model_state(state: Sequence[Tensor]) -> RWKVState:
    """The model's list, for each layer att, num, den, max and ffn, each [C] -> `nn.RWKVState` of one sequence."""
    if not state or len(state) % 5 or any(tensor.dim() != 1 for tensor in state):
        raise ValueError(
            f"state: expected five tensors [C] for each layer as RWKV.forward of version 4 returns them, got "
            f"{len(state)} of shapes {sorted({tuple(tensor.shape) for tensor in state})}"
        )
    att, num, den, top, ffn = (torch.stack(tuple(state[part::5])).unsqueeze(1) for part in range(5))
    return RWKVState(att, ffn, torch.stack((num, den, top), 2))


def export_model_state(state: RWKVState) -> list[Tensor]:
    """`nn.RWKVState` of one sequence -> the model's list; ValueError for several sequences."""
    if state.wkv.shape[1] != 1:
        raise ValueError(f"state: expected one sequence, got {state.wkv.shape[1]}; RWKVState.take picks one")
    parts = (state.att_shift, *state.wkv.unbind(2), state.ffn_shift)
    # Each in memory of its own, because the model writes to them.
    return [part[layer, 0].clone() for layer in range(state.wkv.shape[0]) for part in parts]
