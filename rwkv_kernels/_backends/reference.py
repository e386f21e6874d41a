"""The oracle as a backend: plain torch on any device, only by name, because it is orders of magnitude slower."""

from .. import reference
from .registry import Backend

__all__ = ["BACKEND"]

BACKEND = Backend("reference", reference.wkv, bi_forward=reference.bi_wkv)
