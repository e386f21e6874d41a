"""Compiles every host source for another processor, as far as the linker: python tools/cross_compile.py COMPILER."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
FLAGS = ["-fsyntax-only", "-std=c++20", "-Wall", "-Werror", "-Wno-psabi", "-fopenmp"]
MACROS = ["-DTORCH_EXTENSION_NAME=_C", '-DWKV_COMPILER="cross"']


def main(compiler: str) -> None:
    sources = (ROOT / "csrc" / "sources.txt").read_text().split()
    # What is in csrc/cuda needs the headers of a torch with CUDA.
    sources = [source for source in sources if not source.startswith("csrc/cuda/")]
    folders = [*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
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
