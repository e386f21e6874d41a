"""Builds rwkv_kernels._C from csrc/sources.txt; everything else about the package is in pyproject.toml."""

import os
import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = (ROOT / "csrc" / "sources.txt").read_text().split()

# The walks never look at floating-point exceptions or errno. Products and sums shall fuse, which Clang does across
# inlined functions only if told.
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wno-psabi", "-fvisibility=hidden"]
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]  # at::parallel_for is silently serial without it


class Build(BuildExtension):
    """Also records the torch of the build, which the package reads before it loads a library made for another one."""

    def run(self) -> None:
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib)
        (package / "rwkv_kernels" / "_built_for.txt").write_text(torch.__version__ + "\n")


setup(
    ext_modules=[
        CppExtension(
            "rwkv_kernels._C",
            SOURCES,
            define_macros=[("WKV_COMPILER", f'"{os.path.basename(os.environ.get("CXX", "c++"))}"')],
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
        )
    ],
    cmdclass={"build_ext": Build},
)
