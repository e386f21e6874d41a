"""Sees that the compiler has OpenMP before anything is compiled, for setup.py and CMakeLists.txt."""

import shlex
import subprocess
import tempfile
from pathlib import Path

PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"

WHAT_TO_INSTALL = (
    "Clang's is a package of its own: `apt-get install libomp-dev` on Debian and Ubuntu, where clang-N takes "
    "libomp-N-dev, `dnf install libomp-devel` on Fedora, `conda install llvm-openmp`. GCC brings its own: CXX=g++"
)


def require(compiler: str) -> None:
    """Ends the build, and says what to install, where the C++ compiler cannot make a program with OpenMP."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "program.cpp"
        source.write_text(PROGRAM)
        command = [*shlex.split(compiler), "-fopenmp", str(source), "-o", str(Path(folder) / "program")]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise SystemExit(f"there is no C++ compiler {compiler!r} ({error}): name one in CXX") from error
    if result.returncode != 0:
        raise SystemExit(f"{compiler} compiles no program with OpenMP: {WHAT_TO_INSTALL}\n{result.stderr}")
