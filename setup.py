"""Builds the libraries of csrc/; everything else about the package is in pyproject.toml.

They use torch's stable ABI alone and know no Python: one build serves every torch from 2.11 on and every Python. The
CUDA kernels are a separate library, built where a CUDA toolkit and a CUDA build of torch are found, whether or not
there is a GPU. RWKV_KERNELS_CUDA=0 leaves them out, RWKV_KERNELS_CUDA=1 requires them, with a toolkit and any torch;
TORCH_CUDA_ARCH_LIST names the GPUs.

Without a C++ compiler or without a torch the package is built without libraries, and a file in it gives the reason. The
pybind11 module _introspection is for this source tree's tests and benchmarks: only `build_ext --inplace` builds it.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension as build_ext
except ImportError:
    from setuptools.command.build_ext import build_ext

    torch = None

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
# A file of this source tree, which no build front end has on its path.
import cuda_toolkit  # noqa: E402

OLDEST_TORCH = (2, 11)

# No kernel reads floating-point exceptions or errno. Products and sums must fuse, which Clang does across inlined
# functions only with the flag. In a*b + c*d GCC fuses another product without -fwrapv, which most Pythons add: set
# here, it makes the last bit independent of the Python and the build system.
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fwrapv"]
FLAGS += ["-Wall", "-Wno-psabi", "-fvisibility=hidden"]

# Symbols for a debugger are nine tenths of a library.
STRIP = ["-Wl,-s"] if sys.platform == "linux" else []


def why_no_library() -> str | None:
    """None where the libraries can be built, else the reason, which the doctor shows."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if torch is None:
        return "there was no torch when it was installed, and pip's isolated build sees none"
    if torch.__version__ < OLDEST_TORCH:
        return f"torch was {torch.__version__} when it was installed, and the build needs {oldest} or newer"
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"there was no C++ compiler ({compiler}, of the environment variable CXX) when it was installed"
    return None


class Build(build_ext):
    """Names the libraries and keeps those of an earlier build out of this one."""

    def finalize_options(self) -> None:
        if self.inplace and not self.editable_mode and WHY_NO_LIBRARY is None:
            self.distribution.ext_modules.append(introspection())
        super().finalize_options()

    def run(self) -> None:
        if WHY_NO_LIBRARY is not None:
            raise SystemExit(f"nothing is built: {WHY_NO_LIBRARY}")
        stale = list(Path(self.build_lib, "rwkv_kernels").glob("*.so"))
        if self.inplace:
            stale += (ROOT / "rwkv_kernels").glob("librwkv_kernels*.so")
        for path in stale:
            path.unlink()
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        if name.startswith("lib"):
            return os.path.join(*folders, name + ".so")
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        """Keeps the objects of each library apart: sources that two of them share are compiled with other macros."""
        shared = self.build_temp
        self.build_temp = os.path.join(shared, extension.name.split(".")[-1])
        super().build_extension(extension)
        self.build_temp = shared


class BuildPython(build_py):
    """Leaves modules of an earlier build out, and writes the reason into the package where libraries are missing."""

    def run(self) -> None:
        # setuptools keeps the modules of an earlier build, also those that the package has no more.
        for path in Path(self.build_lib, "rwkv_kernels").rglob("*.py"):
            path.unlink()
        super().run()
        if WHY_NO_LIBRARY is not None and not self.editable_mode:
            Path(self.build_lib, "rwkv_kernels", "_why_no_library.txt").write_text(WHY_NO_LIBRARY + "\n")


class Wheel(bdist_wheel):
    """Tags the wheel for any Python 3: the libraries know none."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def operators() -> Extension:
    return Extension(
        "rwkv_kernels.librwkv_kernels",
        sources("ops.cpp", "cpu/*.cpp"),
        language="c++",
        define_macros=macros(),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=FLAGS,
        extra_link_args=STRIP,
    )


def cuda(toolkit: cuda_toolkit.Toolkit) -> Extension:
    architectures = toolkit.architectures()
    # BuildExtension finds nvcc here, not behind a wrapper script. It refuses the nvcc of another CUDA than torch's, and
    # beside a torch without CUDA it requests no dependencies from nvcc: the library uses nothing of torch's CUDA.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    torch.version.cuda = toolkit.version
    return Extension(
        f"rwkv_kernels.librwkv_kernels_cuda{toolkit.version.split('.')[0]}",
        sources("cuda/*.cpp", "cuda/*.cu"),
        language="c++",
        define_macros=[
            *macros(),
            ("USE_CUDA", None),
            ("WKV_CUDA_ARCHITECTURES", f'"{",".join(architectures)}"'),
        ],
        include_dirs=[*cpp_extension.include_paths(), str(toolkit.home / "include")],
        library_dirs=[*cpp_extension.library_paths(), str(toolkit.home / "lib64")],
        libraries=["torch_cpu", "cudart"],
        extra_compile_args={"cxx": FLAGS, "nvcc": [*toolkit.library_flags(architectures), "--threads=0"]},
        extra_link_args=STRIP,
    )


def introspection() -> Extension:
    try:
        import pybind11
    except ImportError as error:
        raise SystemExit("an in-place build makes rwkv_kernels._introspection too: `pip install pybind11`") from error
    return Extension(
        "rwkv_kernels._introspection",
        sources("introspection.cpp", "cpu/plan.cpp"),
        language="c++",
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        extra_link_args=STRIP,
    )


def macros() -> list[tuple[str, str | None]]:
    compiler = os.path.basename(shlex.split(cpp_extension.get_cxx_compiler())[0])
    # Torch's headers have a byte each for major and minor, at the top of 64 bits; this also bars everything unstable.
    target = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    return [("TORCH_TARGET_VERSION", target), ("WKV_COMPILER", f'"{compiler}"')]


def libraries() -> list[Extension]:
    if WHY_NO_LIBRARY is None:
        toolkit = cuda_toolkit.to_build_with(torch.version.cuda)
        return [operators(), *([cuda(toolkit)] if toolkit else [])]
    if os.environ.get("RWKV_KERNELS_CUDA") == "1":
        raise SystemExit(f"RWKV_KERNELS_CUDA=1, but {WHY_NO_LIBRARY}")
    print(f"rwkv_kernels gets no libraries: {WHY_NO_LIBRARY}", file=sys.stderr)
    return []


WHY_NO_LIBRARY = why_no_library()
setup(ext_modules=libraries(), cmdclass={"build_ext": Build, "build_py": BuildPython, "bdist_wheel": Wheel})
