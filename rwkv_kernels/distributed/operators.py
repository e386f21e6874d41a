"""The operators of a backend as both passes of a slice call them: without the derivative that torch knows of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import native
from .._backends.registry import BackendUnavailable, select

__all__ = ["Operators"]

# Of the operators of each backend that has some.
PREFIXES = {"cpu": "wkv", "cuda": "wkv", "triton": "triton"}


class Operators(NamedTuple):
    """Those of a backend."""

    backend: str

    @staticmethod
    def of(backend: str, k: Tensor) -> "Operators":
        """Those of the backend of that name for this k; raises BackendUnavailable where it has none."""
        name = select(backend, k).name
        if name not in PREFIXES:
            raise BackendUnavailable(f"wkv backend {name!r} cannot run across ranks; can: {', '.join(PREFIXES)}.")
        return Operators(name)

    def _find(self, name: str) -> OpOverload:
        full = name.format(PREFIXES[self.backend])
        operator: OpOverload = getattr(getattr(torch.ops, native.NAMESPACE), full).default
        return operator

    def forward(self, *inputs: Tensor | None, checkpoint: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(w, u, k, v, state, r) -> y, the state after the steps, checkpoints."""
        *plain, r = inputs
        if r is None:
            return self._find("{}_forward")(*plain, checkpoint)  # type: ignore[no-any-return]
        return self._find("{}_mixing_forward")(*inputs, None, checkpoint)  # type: ignore[no-any-return]

    def backward(
        self, inputs: Sequence[Tensor | None], checkpoints: Tensor, gy: Tensor, gstate: Tensor | None
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs."""
        *plain, r = inputs
        if r is None:
            return (*self._find("_{}_backward")(*plain, checkpoints, gy, gstate), None)
        return self._find("_{}_mixing_backward")(*inputs, None, checkpoints, gy, gstate)  # type: ignore[no-any-return]

    def summary(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The state [B, 3, C] that the steps leave behind an empty one."""
        return self._find("_{}_summary")(w, u, k, v)  # type: ignore[no-any-return]

    def adjoint_summary(self, inputs: Sequence[Tensor | None], checkpoints: Tensor, gy: Tensor) -> Tensor:
        """The adjoint [B, 2, C] before the steps where the one after them is zero."""
        return self._find("_{}_adjoint_summary")(*inputs, checkpoints, gy)  # type: ignore[no-any-return]
