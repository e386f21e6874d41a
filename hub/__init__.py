"""The module that Hugging Face's `kernels` imports: the package's names, and the functions that RwkvModel calls.

`make hub` lays this file beside a copy of the package. Imports are relative: `kernels` gives the module the name of its
build, and the libraries register their operators under that name.
"""

from . import rwkv_kernels
from .rwkv_kernels import *  # noqa: F403
from .rwkv_kernels.compat import hub
from .rwkv_kernels.compat.hub import *  # noqa: F403

__all__ = [*rwkv_kernels.__all__, *hub.__all__]
