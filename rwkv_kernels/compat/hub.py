"""The functions of Hugging Face's kernel `rwkv`, which transformers' RwkvModel calls on a GPU.

    LOCAL_KERNELS="kernels-community/rwkv=build/hub" python train.py

makes transformers load a copy of this package that `make hub` lays out, and call these. Original: version 1 of
kernels-community/rwkv, as transformers 5.18 to 5.24 call it in `transformers/models/rwkv/modeling_rwkv.py`. Its decay
is **negative**: the log-decay itself, -exp(time_decay). The gradient that it gives is nevertheless that of the **raw**
decay time_decay, which transformers returns as it is. Its state is [B, C, 3]: num, den and max innermost. Every result
is written to a tensor that the caller made.

Deliberate differences:

- gw and gu are the sums over the batch, [C], as the caller's tensors are. The original writes a row for each of the B
  sequences to them: right for B = 1, out of bounds for more.
- T is not limited (the original's backward is compiled for 1024 steps), and B·C need not be a multiple of 32. But
  transformers sets `max_seq_length` to the model's `context_length` and refuses what is longer, and other B·C, itself.
- Tensors of any layout in memory, on every device of `rwkv_kernels.wkv`; float64, too. The original reads what lies at
  the tensor's address, and refuses the CPU.
- u may be float32 for bfloat16 k, as under autocast.
- bfloat16: y is not read back rounded in backward.

As in the original, backward has no argument for a state: it is the derivative of a sequence from an empty state, and a
state that was passed to forward is ignored. `rwkv_kernels.compat.transformers.patch()` has no such limit.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..functional import wkv

__all__ = [
    "backward",
    "backward_bf16",
    "forward",
    "forward_bf16",
    "forward_with_state",
    "forward_with_state_bf16",
    "max_seq_length",
]

# The longest sequence, which transformers compares with T after it has overwritten the number with its own.
max_seq_length = sys.maxsize

WIDE = (torch.float32, torch.float64)
BF16 = (torch.bfloat16,)


def _check_inputs(dtypes: tuple[torch.dtype, ...], **inputs: Tensor) -> None:
    """Checks beyond those of `wkv`: the function is the one for the dtype, and no gradient gets lost."""
    k = inputs["k"]
    if k.dtype not in dtypes:
        other = "call the function whose name ends in _bf16" if k.dtype == torch.bfloat16 else "convert k and v"
        raise TypeError(f"k: expected {' or '.join(map(str, dtypes))}, got {k.dtype}; {other}")
    if torch.is_grad_enabled():
        for name, tensor in inputs.items():
            if tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient to be required by a function that writes to given tensors (call it "
                    "in an autograd.Function, which has no second derivative then, or under torch.no_grad(); or call "
                    "wkv, which is differentiable), got requires_grad=True"
                )


def _check_like(name: str, tensor: Tensor, shape: list[int], dtypes: tuple[torch.dtype, ...], k: Tensor) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape} for k {list(k.shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))} for k of {k.dtype}, got {tensor.dtype}")
    if tensor.device != k.device:
        raise ValueError(f"{name}: expected device {k.device} as k, got {tensor.device}")


def _raw(w: Tensor) -> Tensor:
    """The raw decay of a log-decay; in float64, so that the way there and back costs no rounding."""
    return (-w.double()).log()


def _functions(dtypes: tuple[torch.dtype, ...], suffix: str = "") -> Iterator[Callable[..., None]]:
    """`forward`, `forward_with_state` and `backward` for these dtypes of k, under their names in this module."""

    def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        """The operator from an empty state, written to y.

        Args:
            w: [C], any floating dtype, at most 0: the log-decay itself. Above 0 everything becomes NaN.
            u: [C], any floating dtype, the bonus.
            k, v: [B, T, C], both the same: float32 or float64, or bfloat16 for the functions whose names end in _bf16.
                All sums are float32, for float64 inputs float64.
            y: [B, T, C] in k's dtype, overwritten.

        Not differentiable by itself; `backward` is its derivative.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or device; or, outside of an
                autograd.Function, a gradient would be required. y is untouched then.
            BackendUnavailable: as for `rwkv_kernels.wkv`.
        """
        _check_inputs(dtypes, w=w, u=u, k=k, v=v)
        _check_like("y", y, list(k.shape), (k.dtype,), k)
        with torch.no_grad():
            y.copy_(wkv(_raw(w), u, k, v))

    def forward_with_state(w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, s: Tensor) -> None:
        """`forward` from a state, which moves on in place.

        Args:
            w, u, k, v, y: As for `forward`.
            s: [B, C, 3], float32 or float64: (num, den, max), overwritten by the state after the last step. An empty
                one is (0, 0, anything).

        Raises as `forward` does; y and s are untouched then.
        """
        _check_inputs(dtypes, w=w, u=u, k=k, v=v)
        _check_like("y", y, list(k.shape), (k.dtype,), k)
        _check_like("s", s, [k.shape[0], k.shape[-1], 3], WIDE, k)
        state = s.transpose(1, 2).to(torch.promote_types(k.dtype, torch.float32)).contiguous()
        with torch.no_grad():
            output, after = wkv(_raw(w), u, k, v, state, return_state=True)
            y.copy_(output)
            s.copy_(after.transpose(1, 2))

    def backward(
        w: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        gy: Tensor,
        gw: Tensor,
        gu: Tensor,
        gk: Tensor,
        gv: Tensor,
    ) -> None:  # fmt: skip
        """The gradients of Σ y·gy, y as `forward` gives it, written to gw, gu, gk and gv.

        Args:
            w, u, k, v: As for `forward`.
            y: As `forward` wrote it. It is not read: the states that backward needs come from another run of the
                forward kernel, and y with them.
            gy: [B, T, C] in k's dtype.
            gw: [C], float32, float64 or bfloat16, overwritten by the gradient of the raw decay, log(-w), which is that
                of the log-decay times w. Summed over the batch in the dtype of the sums, and rounded once.
            gu: [C], float32, float64 or bfloat16, overwritten. Summed over the batch likewise.
            gk, gv: [B, T, C] in k's dtype, overwritten.

        Raises as `forward` does; nothing is written then.
        """
        _check_inputs(dtypes, w=w, u=u, k=k, v=v, gy=gy)
        for name, tensor in (("gy", gy), ("gk", gk), ("gv", gv)):
            _check_like(name, tensor, list(k.shape), (k.dtype,), k)
        for name, tensor in (("gw", gw), ("gu", gu)):
            _check_like(name, tensor, [k.shape[-1]], (*WIDE, *BF16), k)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (_raw(w), u, k, v)]
            output = wkv(*leaves)
        with torch.no_grad():
            for written, gradient in zip((gw, gu, gk, gv), torch.autograd.grad(output, leaves, gy), strict=True):
                written.copy_(gradient)

    for function in (forward, forward_with_state, backward):
        function.__name__ = function.__qualname__ = function.__name__ + suffix
        yield function


forward, forward_with_state, backward = _functions(WIDE)
forward_bf16, forward_with_state_bf16, backward_bf16 = _functions(BF16, "_bf16")
