"""The operator and the model on several devices, by torch.distributed alone: docs/distributed.md."""

from .context import token_shift, wkv

__all__ = ["token_shift", "wkv"]
