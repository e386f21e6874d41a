"""What this build of the package is."""

from dataclasses import dataclass

from ._extension import extension

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """The compiled extension; every field but `why_missing` is None or empty where there is none."""

    extension: str | None  # path of the library
    why_missing: str | None
    torch: str | None  # version that it was compiled with
    compiler: str | None
    openmp: bool | None
    cpu_instruction_sets: tuple[str, ...]  # compiled in
    cpu_instruction_set: str | None  # in use on this machine
    cuda: str | None  # version of the toolkit, None for a build without CUDA kernels
    cuda_architectures: tuple[str, ...]  # compute capabilities such as "9.0", "9.0+PTX" where newer GPUs may follow


def build_info() -> BuildInfo:
    """What was compiled, with what, and which instruction set is in use."""
    if extension.module is None:
        return BuildInfo(None, extension.why_missing, None, None, None, (), None, None, ())
    return BuildInfo(str(extension.module.__file__), None, **extension.module.build_info())
