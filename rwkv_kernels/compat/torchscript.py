"""`rwkv_kernels.wkv` with a state, for drop-ins whose originals are called from TorchScript.

TorchScript compiles what a scripted function calls, and cannot compile `wkv`. It gets an operator instead, behind which
`wkv` runs in Python: arguments are checked and a backend is chosen at each call, and gradients flow. An operator and
not a function under `torch.jit.ignore`, because a scripted module that calls an operator can be saved and frozen; it
loads where this module has been imported.
"""

import torch
from torch import Tensor

from .. import native
from ..functional import wkv

__all__ = ["wkv_with_state"]

# Registrations last as long as this object.
_library = torch.library.Library(native.NAMESPACE, "FRAGMENT")
_library.define("wkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state) -> (Tensor, Tensor)")


def _wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return wkv(w, u, k, v, state, return_state=True)


# Composite: autograd, autocast and the device's kernels come from the operators that `wkv` calls.
_library.impl("wkv", _wkv, "CompositeImplicitAutograd")

# TorchScript looks up an operator in a global, but no namespace that has its name in a variable.
_operator = getattr(torch.ops, native.NAMESPACE).wkv


def wkv_with_state(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`rwkv_kernels.wkv(w, u, k, v, state, return_state=True)`, from Python and from TorchScript."""
    # TorchScript compiles no branch that only Python takes.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _operator(w, u, k, v, state)  # type: ignore[no-any-return]
    else:
        return _wkv(w, u, k, v, state)
