"""Python programs in new processes, as a user would start them."""

import os
import subprocess
import sys
from pathlib import Path

import rwkv_kernels

PACKAGE = Path(rwkv_kernels.__file__).parent


def run_python(code: str, root: Path = PACKAGE.parent, **environment: str) -> str:
    """The program's output; it runs in the folder `root`, which holds the package that it imports."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
