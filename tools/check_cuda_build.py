"""Checks a CUDA build of the package that is found first, without needing a GPU: `make wheel-test` runs it.

python tools/check_cuda_build.py 9.0    # the architectures that it must have
"""

import sys

import torch

import rwkv_kernels
from rwkv_kernels import __main__ as doctor
from rwkv_kernels import native


def require(condition: bool, what: str) -> None:
    """Ends the program with the fault unless the condition holds."""
    if not condition:
        sys.exit(f"cuda build: {what}")


def main(architectures: tuple[str, ...]) -> None:
    """All checks, the cheapest first."""
    build = rwkv_kernels.build_info()
    require(build.cuda is not None, str(build.why_cuda_missing))
    require(build.cuda_architectures == architectures, f"made for {build.cuda_architectures}, expected {architectures}")

    for name in ("wkv_forward", "_wkv_backward", "wkv_mixing_forward", "_wkv_mixing_backward", "wkv_step"):
        for key in ("CPU", "CUDA"):
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"{native.NAMESPACE}::{name}", key)
            require(has_kernel, f"{name} has no {key} kernel")

    require(not torch.cuda.is_initialized(), "the import initialises CUDA")
    reason = next(info.reason for info in rwkv_kernels.backends() if info.name == "cuda")
    if torch.cuda.is_available():
        require(reason is None, f"there is a GPU, and the backend says: {reason}")
    else:
        require("finds no usable GPU" in str(reason), f"there is no GPU, and the backend says: {reason}")
    x = torch.zeros(1, 1, 1)
    try:
        rwkv_kernels.wkv(x[0, 0], x[0, 0], x, x, backend="cuda")
        require(False, "the CUDA backend takes tensors on the CPU")
    except rwkv_kernels.BackendUnavailable as refusal:
        require(str(refusal).endswith("Available for this call: cpu, reference."), str(refusal))

    # Its self-check compares outputs and gradients of every backend that can run with the oracle.
    require(doctor.main() == 0, "the doctor finds it unwell")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
