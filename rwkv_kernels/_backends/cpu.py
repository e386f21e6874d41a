"""The C++ kernels for the CPU."""

from .. import native
from . import compiled
from .registry import Backend

__all__ = ["BACKEND"]

BACKEND = Backend(
    "cpu",
    compiled.forward,
    compiled.step,
    compiled.bi_forward,
    # Tensors on meta have no data, so the operator's fake kernel serves them.
    device_types=("cpu", "meta"),
    automatic=True,
    why_unavailable=lambda: native.operators.why_missing,
)
