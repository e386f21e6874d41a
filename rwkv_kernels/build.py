"""The build of the package, and the parts of it that are in use."""

from dataclasses import dataclass

from . import native

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """The libraries that are loaded.

    Where one is not, its fields are None or empty, but for the one that says why; fields of the CUDA kernels describe
    the library that is loaded, so they are empty in a torch without CUDA, too.
    """

    library: str | None  # path of the operators and CPU kernels
    why_missing: str | None  # why there is no such library, and what would help
    torch: str | None  # version of the headers that it was compiled with; it loads in every torch from 2.11 on
    compiler: str | None  # of C++, such as "g++"
    cpu_instruction_sets: tuple[str, ...]  # compiled in, the smallest first
    cpu_instruction_set: str | None  # in use on this machine
    cuda_library: str | None  # path of the CUDA kernels
    why_cuda_missing: str | None  # why there is no such library, and what would help
    cuda: str | None  # version of the toolkit that compiled them, such as "13.0"
    cuda_architectures: tuple[str, ...]  # compute capabilities such as "9.0", "9.0+PTX" where newer GPUs may follow


def build_info() -> BuildInfo:
    """The libraries that were compiled, by which compilers, and the instruction set in use."""
    operators, cuda = native.operators, native.cuda
    return BuildInfo(
        library=None if operators.path is None else str(operators.path),
        why_missing=operators.why_missing,
        torch=operators.info.get("torch"),
        compiler=operators.info.get("compiler"),
        cpu_instruction_sets=tuple(operators.info.get("cpu_instruction_sets", ())),
        cpu_instruction_set=operators.info.get("cpu_instruction_set"),
        cuda_library=None if cuda.path is None else str(cuda.path),
        why_cuda_missing=cuda.why_missing,
        cuda=cuda.info.get("cuda"),
        cuda_architectures=tuple(cuda.info.get("cuda_architectures", ())),
    )
