"""C++ programs and libraries of the tests, compiled once for all processes that test the same sources."""

import fcntl
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def compiled(name: str, command: list[str], source: Path, *versions: str) -> Path:
    """The output of a compiler command for the source, in build/`name`, cached by the content of source and csrc."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(repr((command, versions)).encode() + version)
    for path in [source, *sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.def"))]:
        content.update(path.read_bytes())
    result = ROOT / "build" / name / content.hexdigest()[:16]
    result.parent.mkdir(parents=True, exist_ok=True)
    with (result.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            unfinished = result.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(result)
    return result
