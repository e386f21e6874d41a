"""Lays out build/hub, which Hugging Face's `kernels` loads: this package, in an operator namespace of its own.

    build/hub/build/<variant>/metadata.json
                              __init__.py      hub/__init__.py
                              rwkv_kernels/    the package and its libraries

A variant is named by the ABI that it needs, its backend, processor and system, as `kernels` parses it. The one for the
CPU is always made, and one for CUDA beside it where setup.py builds CUDA kernels.

The namespace is the variant's id, which `kernels` also imports it under, so that several copies can be loaded by one
process, an installed package among them. It names the content: another one has another id. Only the sources that
register operators are compiled with it; the objects of the others are those of the ordinary build.
"""

import hashlib
import json
import platform
import shutil
import sys
import tomllib
from distutils.core import run_setup
from pathlib import Path
from typing import Any

from setuptools import Extension

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "hub"
FRONT = ROOT / "hub" / "__init__.py"
CONFIGURATION = ROOT / "hub" / "build.toml"


def package_files() -> list[Path]:
    return sorted((ROOT / "rwkv_kernels").rglob("*.py"))


def identifier(name: str, backend: str) -> str:
    digest = hashlib.sha256()
    for path in [FRONT, CONFIGURATION, *package_files(), *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"_{name}_{backend}_{digest.hexdigest()[:8]}"


def variant_name(stable_abi: str, compute: str) -> str:
    system, machine = platform.system().lower(), platform.machine()
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return f"torch-stable-abi{stable_abi.replace('.', '')}-{compute}-{machine}-{system}"
