"""Compiles the libraries' host sources for another processor, without linking: tools/cross_compile.py COMPILER."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_toolkit
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
FLAGS = ["-fsyntax-only", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi"]
MACROS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DWKV_COMPILER="cross"']
MACROS += ["-DUSE_CUDA", '-DWKV_CUDA_ARCHITECTURES="9.0"']  # which the operators' sources do not read


def main(compiler: str) -> None:
    patterns = ["ops.cpp", "cpu/*.cpp"]
    folders = cpp_extension.include_paths()
    toolkit = cuda_toolkit.find_toolkit()
    if toolkit is None:
        print(f"without what goes with CUDA kernels: {cuda_toolkit.NO_TOOLKIT}")
    else:
        patterns.append("cuda/*.cpp")
        folders.append(str(toolkit.home / "include"))
    sources = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern))]
    command = [compiler, *FLAGS, *MACROS, *(f"-isystem{folder}" for folder in folders)]

    def compile_one(source: str) -> int:
        return subprocess.run([*command, source], cwd=ROOT).returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [source for source, code in zip(sources, pool.map(compile_one, sources), strict=True) if code != 0]
    if failed:
        raise SystemExit(f"{compiler} does not compile {', '.join(failed)}")
    print(f"{compiler} compiles {', '.join(sources)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
