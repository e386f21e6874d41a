"""Builds rwkv_kernels._C from csrc/sources.txt; everything else about the package is in pyproject.toml.

CUDA kernels are part of it where a CUDA toolkit and a CUDA build of torch are found, whether or not there is a GPU.
RWKV_KERNELS_CUDA=0 leaves them out and RWKV_KERNELS_CUDA=1 insists; TORCH_CUDA_ARCH_LIST says for which GPUs.
"""

import os
import platform
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
# Files of this source tree, which no build front end has on its path.
import cuda_toolkit  # noqa: E402
import openmp  # noqa: E402

# The walks never look at floating-point exceptions or errno. Products and sums shall fuse, which Clang does across
# inlined functions only if told.
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wno-psabi", "-fvisibility=hidden"]
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]  # at::parallel_for is silently serial without it


class Build(cpp_extension.BuildExtension):
    """Also records the torch of the build, which the package reads before it loads a library made for another one."""

    def run(self) -> None:
        if OPENMP:
            openmp.require(cpp_extension.get_cxx_compiler())
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib)
        (package / "rwkv_kernels" / "_built_for.txt").write_text(torch.__version__ + "\n")


def extension(toolkit: cuda_toolkit.Toolkit | None) -> cpp_extension.CppExtension:
    sources = (ROOT / "csrc" / "sources.txt").read_text().split()
    macros = [("WKV_COMPILER", f'"{os.path.basename(os.environ.get("CXX", "c++"))}"')]
    flags = {"cxx": FLAGS + OPENMP}
    if toolkit is None:
        sources = [source for source in sources if not source.startswith("csrc/cuda/")]
        make = cpp_extension.CppExtension
    else:
        architectures = toolkit.architectures()
        macros.append(("WKV_CUDA_ARCHITECTURES", f'"{",".join(architectures)}"'))
        flags["nvcc"] = [*cuda_toolkit.nvcc_flags(architectures), "--threads=0"]
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch takes a wrapper script for the toolkit
        make = cpp_extension.CUDAExtension
    return make("rwkv_kernels._C", sources, define_macros=macros, extra_compile_args=flags, extra_link_args=OPENMP)


setup(ext_modules=[extension(cuda_toolkit.to_build_with(torch.version.cuda))], cmdclass={"build_ext": Build})
