"""The CUDA kernels: whether there is a GPU that they were compiled for."""

import torch
from torch import Tensor

from .. import native
from . import compiled
from .registry import Backend, constant

__all__ = ["BACKEND"]


@constant
def why_unavailable() -> str | None:
    """Why no GPU here runs the kernels, or None."""
    if native.cuda.why_missing is not None:
        return native.cuda.why_missing
    if not torch.cuda.is_available():
        return f"torch for CUDA {torch.version.cuda} finds no usable GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def _covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture such as "9.0", or with its PTX "9.0+PTX", runs on a GPU."""
    major, minor = (int(part) for part in architecture.removesuffix("+PTX").split("."))
    return (major == capability[0] and minor <= capability[1]) or (
        architecture.endswith("+PTX") and (major, minor) <= capability
    )


@constant
def why_uncovered(index: int) -> str | None:
    """Why the kernels do not run on this GPU, or None."""
    capability = torch.cuda.get_device_capability(index)
    built = native.cuda.info["cuda_architectures"]
    if any(_covers(architecture, capability) for architecture in built):
        return None
    number = f"{capability[0]}.{capability[1]}"
    return (
        f"cuda:{index} has compute capability {number}, and this build is for {', '.join(built)}: rebuild with "
        f"TORCH_CUDA_ARCH_LIST={number}"
    )


def _why_not(k: Tensor) -> str | None:
    return why_unavailable() or why_uncovered(k.device.index)


BACKEND = Backend(
    "cuda",
    compiled.forward,
    compiled.step,
    compiled.bi_forward,
    device_types=("cuda",),
    automatic=True,
    why_unavailable=why_unavailable,
    why_not=_why_not,
)
