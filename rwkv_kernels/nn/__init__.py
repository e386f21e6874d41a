"""RWKV-4, the model of the paper, in torch on top of `rwkv_kernels.wkv`: its layers, its state, its checkpoints."""

from rwkv_kernels.nn.layers import Block, ChannelMix, TimeMix
from rwkv_kernels.nn.model import RWKV
from rwkv_kernels.nn.state import RWKVState

__all__ = ["RWKV", "Block", "ChannelMix", "RWKVState", "TimeMix"]
