"""The Triton backend: docs/triton.md leads through its plan, kernels and operators."""

from .op import BACKEND

__all__ = ["BACKEND"]
