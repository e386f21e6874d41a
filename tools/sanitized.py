"""Builds tests/sanitized.cu, the CUDA kernels in a program without torch: `sanitized.py PROGRAM 9.0`."""

import subprocess
import sys
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda" / "kernels.cu"
PROGRAM = ROOT / "tests" / "sanitized.cu"


def build(program: Path, architectures: list[str], kernels: Path) -> None:
    """Compiles and links; `kernels` is their source, or its object file of a build of the CUDA library."""
    toolkit = cuda_toolkit.find_toolkit()
    if toolkit is None:
        raise SystemExit("there is no nvcc")
    program.parent.mkdir(parents=True, exist_ok=True)
    flags = [*cuda_toolkit.nvcc_flags(architectures), "-lineinfo", "--split-compile=0", f"-I{ROOT / 'csrc'}"]
    subprocess.run([toolkit.nvcc, *flags, PROGRAM, kernels, "-o", program], check=True)


def newest_kernels() -> Path:
    """The object file of the CUDA library's kernels, if one lies in build/ and is newer than the sources."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    changed = max(path.stat().st_mtime for path in sources)
    # Those of setup.py with --inplace, which builds for the GPU that is here.
    made = [path for path in (ROOT / "build").glob("temp*/**/kernels.o") if path.stat().st_mtime > changed]
    return max(made, key=lambda path: path.stat().st_mtime, default=KERNELS)


if __name__ == "__main__":
    build(Path(sys.argv[1]), [sys.argv[2]], newest_kernels())
