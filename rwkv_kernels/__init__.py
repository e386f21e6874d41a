"""The WKV operator of RWKV-4 for PyTorch: compiled, exact, with state in and out and every gradient."""

import torch  # noqa: F401 - before the package's libraries, which need those of torch

from ._backends import BackendInfo, BackendUnavailable, backends, use_backend
from .build import BuildInfo, build_info
from .functional import bi_wkv, empty_state, wkv, wkv_step
from .version import VERSION

__version__ = VERSION

__all__ = [
    "BackendInfo",
    "BackendUnavailable",
    "BuildInfo",
    "backends",
    "bi_wkv",
    "build_info",
    "empty_state",
    "use_backend",
    "wkv",
    "wkv_step",
]
