"""Python programs in processes of their own, as a user would start them."""

import os
import subprocess
import sys
from pathlib import Path

import rwkv_kernels

PACKAGE = Path(rwkv_kernels.__file__).parent


def run_python(code: str, root: Path = PACKAGE.parent, **environment: str) -> str:
    """The program's output; `root` is where it runs and holds the package that it imports."""
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
