"""The operators of csrc/ops.cpp, whose kernels torch chooses by the device of the tensors: the CPU's and CUDA's."""

from typing import Any

import torch
from torch import Tensor

from .. import autograd, native
from .registry import BackendUnavailable, BiForward, Forward, Step

__all__ = ["bi_forward", "forward", "step"]

# Registrations last as long as this object.
_library = torch.library.Library(native.NAMESPACE, "FRAGMENT")


def _attach() -> tuple[Forward, Step | None, BiForward]:
    if native.operators.why_missing is not None:

        def missing(*_: Tensor | None) -> Any:
            raise BackendUnavailable(native.operators.why_missing)

        return missing, missing, missing

    intervals = {getattr(torch, name): steps for name, steps in native.operators.info["checkpoint_intervals"].items()}
    interval = intervals.__getitem__
    return *autograd.attach(_library, "wkv", interval), autograd.attach_bi(_library, "bi_wkv", interval)


forward, step, bi_forward = _attach()
