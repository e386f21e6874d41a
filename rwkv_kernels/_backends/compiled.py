"""The operators of csrc/ops.cpp, whose kernels torch chooses by the device of the tensors: the CPU's and CUDA's."""

from typing import Any

import torch
from torch import Tensor

from .. import autograd, native
from .registry import BackendUnavailable, Forward, Step

__all__ = ["forward", "step"]

# Registrations last as long as this object.
_library = torch.library.Library(native.NAMESPACE, "FRAGMENT")


def _attach() -> tuple[Forward, Step]:
    if native.operators.why_missing is not None:

        def missing(*_: Tensor | None) -> Any:
            raise BackendUnavailable(native.operators.why_missing)

        return missing, missing

    intervals = {getattr(torch, name): steps for name, steps in native.operators.info["checkpoint_intervals"].items()}
    ops = getattr(torch.ops, native.NAMESPACE)
    forward = autograd.attach(_library, ops.wkv_forward.default, ops._wkv_backward.default, intervals.__getitem__)
    torch.library.register_fake(f"{native.NAMESPACE}::wkv_step", autograd.fake_step, lib=_library)
    return forward, ops.wkv_step.default


forward, step = _attach()
