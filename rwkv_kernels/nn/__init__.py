"""RWKV-4, the model of the paper, in torch on top of `rwkv_kernels.wkv`: its layers, its state, its checkpoints."""

from .layers import Block, ChannelMix, TimeMix
from .model import RWKV
from .packing import Packing, cu_seqlens_of
from .state import RWKVState

__all__ = ["RWKV", "Block", "ChannelMix", "Packing", "RWKVState", "TimeMix", "cu_seqlens_of"]
