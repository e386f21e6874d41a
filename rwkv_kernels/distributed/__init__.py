"""The operator and the model on several devices, by torch.distributed alone: docs/distributed.md."""

from ..shardings import register as register_shardings
from .context import wkv
from .models import context_parallel, parallelize, tensor_parallel_plan
from .shift import token_shift

__all__ = ["context_parallel", "parallelize", "register_shardings", "tensor_parallel_plan", "token_shift", "wkv"]
