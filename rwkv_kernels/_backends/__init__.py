"""The backends, one module for each: a new one is its module, and its place in this list."""

from . import cpu, cuda, reference, triton
from .registry import BackendInfo, BackendUnavailable, backends, register, use_backend

__all__ = ["BackendInfo", "BackendUnavailable", "backends", "use_backend"]

# The order in which "auto" asks them, of those that it asks.
for _module in (cuda, triton, cpu, reference):
    register(_module.BACKEND)
