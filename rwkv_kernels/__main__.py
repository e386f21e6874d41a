"""The doctor, `python -m rwkv_kernels`: what is installed, what works, and if something does not, why.

It exits with 0 where the operators' library is loaded and every backend that can run here is right, otherwise with 1.
The library is required: without it, `wkv` runs on the CPU only with backend="reference". CUDA kernels and Triton are
optional: their absence is reported and is no error.
"""

import platform
import sys

import torch

from . import BuildInfo, __version__, backends, build_info, reference, wkv
from ._backends.registry import BACKENDS

# The self-check's float32 inputs are exact in float64, so this bounds the backend's own rounding: a few ulp of a mean
# of values near 1, and sums of a hundred such steps in the gradients.
SELF_CHECK_TOLERANCE = 1e-4


def _self_check(backend: str) -> float:
    """The worst error of outputs and gradients against the float64 oracle, relative to each one's largest value."""
    device = BACKENDS[backend].device_type
    generator = torch.Generator().manual_seed(0)
    B, T, C = 2, 100, 40
    inputs = [torch.randn(shape, generator=generator) for shape in [(C,), (C,), (B, T, C), (B, T, C)]]
    weight = torch.randn((B, T, C), generator=generator)

    given = [x.to(device).requires_grad_() for x in inputs]
    y = wkv(*given, backend=backend)
    found = [y.detach(), *torch.autograd.grad((y * weight.to(device)).sum(), given)]

    exact = [x.double().requires_grad_() for x in inputs]
    y, _ = reference.wkv(*exact)
    expected = [y.detach(), *torch.autograd.grad((y * weight).sum(), exact)]
    return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def _cuda_summary() -> str:
    if not torch.cuda.is_available():
        return f"none usable (torch was built for CUDA {torch.version.cuda})"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _libraries(build: BuildInfo) -> list[tuple[str, str]]:
    if build.library is None:
        return [("library", f"missing: {build.why_missing}")]
    rows = [
        ("library", build.library),
        ("built with", f"headers of torch {build.torch}, {build.compiler}"),
        ("cpu kernels", f"{build.cpu_instruction_set} in use of {', '.join(build.cpu_instruction_sets)}"),
    ]
    if build.cuda_library is None:
        return [*rows, ("cuda library", f"missing: {build.why_cuda_missing}")]
    cuda_kernels = f"CUDA {build.cuda}, for {', '.join(build.cuda_architectures)}"
    return [*rows, ("cuda library", build.cuda_library), ("cuda kernels", cuda_kernels)]


def main() -> int:
    build = build_info()
    rows = [
        ("rwkv_kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, which the CPU kernels use too"),
        ("gpu", _cuda_summary()),
        *_libraries(build),
    ]
    for name, value in rows:
        print(f"{name:14}{value}")

    healthy = build.library is not None
    print("\nbackends")
    for name, available, reason in backends():
        if not available:
            print(f"  {name:12}not available: {reason}")
            continue
        error = _self_check(name)
        passed = error < SELF_CHECK_TOLERANCE
        healthy &= passed
        print(f"  {name:12}{'available' if passed else 'WRONG'}: off the float64 oracle by {error:.1e} at most")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
