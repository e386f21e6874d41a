"""Finds and loads the package's libraries, or says why one is missing and what would help.

`librwkv_kernels.so` holds the operators' schemas and the CPU kernels, `librwkv_kernels_cuda<major>.so` the CUDA kernels
of these operators for a major version of CUDA. Both use torch's stable ABI alone, so that one build loads in every
Python and in every torch from OLDEST_TORCH on. This module compiles nothing and never looks for a GPU.
"""

import ctypes
import json
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["NAMESPACE", "OLDEST_TORCH", "Library", "cuda", "operators"]

# The folder is resolved and the file is not: in Hugging Face's cache a file is a link to one without neighbours.
PACKAGE = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)
OPERATORS, CUDA = "librwkv_kernels.so", "librwkv_kernels_cuda{}.so"
# One library of both, beside the package, as Hugging Face's kernel-builder makes it by hub/build.toml.
BY_KERNEL_BUILDER = "_rwkv4_*.abi3.so"
TELL_OPERATORS, TELL_CUDA = "rwkv_kernels_build_info", "rwkv_kernels_cuda_build_info"
# The reason, in one line, that an installation from source leaves where it could not build the operators.
WHY_NOT_BUILT = "_why_no_library.txt"


@dataclass(frozen=True)
class Library:
    """A library that is loaded, from `path`, or one that is not, and `why_missing` says why."""

    path: Path | None
    why_missing: str | None
    info: dict[str, Any] = field(default_factory=dict)  # of its build, as the library returns it


def _missing(why: str) -> Library:
    return Library(None, why)


# ---- what would help ----


def _hidden(package: Path) -> Path | None:
    """Another copy of the package, further down sys.path, that has the operators."""
    copies = [Path(entry).resolve() / package.name for entry in sys.path]
    return next((copy for copy in copies if copy != package and (copy / OPERATORS).is_file()), None)


def _what_helps(package: Path) -> str:
    tree = package.parent
    if not (tree / "setup.py").exists():
        return "install a wheel for this platform, or run `pip install --no-build-isolation .` in the source tree"
    # An installed copy is no help to whoever imports the tree, as a Python does that is started in it.
    in_place = f"run `python setup.py build_ext --inplace` in {tree}"
    hidden = _hidden(package)
    if hidden is None:
        return in_place
    return (
        f"this is the source tree {tree}, which hides the package that is installed in {hidden}: start Python in "
        f"another folder (`cd ..`) and without the tree on PYTHONPATH, or {in_place}"
    )


# ---- a file, before and while it is loaded ----

# e_machine of an ELF header, in the words of platform.machine() on Linux.
MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
OTHER_NAMES = {"AMD64": "x86_64", "arm64": "aarch64"}
SYSTEMS = {"linux": "Linux", "darwin": "macOS", "win32": "Windows"}
MACH_O = (b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")  # for one processor, and for several


def _why_unfit(path: Path) -> str | None:
    """An objection to loading the file here, from its header; None leaves the verdict to the system's loader.

    The loader's own words for a library of another processor do not name the processor, and a library that was cut off
    crashes the process.
    """
    with path.open("rb") as file:
        header = file.read(64)
    system, machine = SYSTEMS.get(sys.platform, sys.platform), platform.machine()
    machine = OTHER_NAMES.get(machine, machine)
    is_elf = header.startswith(b"\x7fELF")
    made_for = "macOS" if header.startswith(MACH_O) else "Windows" if header.startswith(b"MZ") else system
    if is_elf and system in ("macOS", "Windows"):
        made_for = "Linux"
    if made_for != system:
        return f"is for {made_for}, and this is {system}"
    if not is_elf or len(header) < 64:
        return None

    def number(start: int, stop: int) -> int:
        return int.from_bytes(header[start:stop], "little" if header[5] == 1 else "big")

    code = number(18, 20)
    made_for = MACHINES.get(code, f"another processor (ELF machine {code})")
    if made_for != machine:
        return f"is for {made_for}, and this is {machine}"
    # The table of sections ends the file: e_shoff, e_shnum entries of e_shentsize bytes.
    size, expected = path.stat().st_size, number(40, 48) + number(60, 62) * number(58, 60)
    return f"is cut off after {size} of {expected} bytes" if size < expected else None


def _ask(path: Path | str, function: str) -> dict[str, Any]:
    """The JSON that a C function of a loaded library returns; raises AttributeError without that function."""
    ask = getattr(ctypes.CDLL(str(path)), function)
    ask.restype = ctypes.c_char_p
    return json.loads(ask())  # type: ignore[no-any-return]


def _why_taken(path: Path) -> str | None:
    """Why the operators' library may not be loaded after another copy of it in this process, or None.

    Torch's error for a namespace that is registered twice leaves a static initialiser, which ends the process. A
    library's namespace is found in the file as the string that it registers.
    """
    for other in torch.ops.loaded_libraries - {os.path.realpath(path)}:
        try:
            namespace = _ask(other, TELL_OPERATORS)["namespace"]
            taken = f"\0{namespace}\0".encode() in path.read_bytes()
        except (OSError, AttributeError):
            continue  # the other is no copy of this library
        if taken:
            return (
                f"{path} registers torch.ops.{namespace}, and so did {other} in this process: import one of the "
                "two packages, or build one of them with another -DWKV_NAMESPACE"
            )
    return None


def _load(path: Path, tell: str) -> Library:
    """Loads the library, whose C function `tell` returns its build."""
    try:
        unfit = _why_unfit(path)
        if unfit is None:
            torch.ops.load_library(str(path))
            return Library(path, None, _ask(path, tell))
    except (OSError, AttributeError) as error:
        # torch's own error names the file alone; the loader's is its cause.
        unfit = f"does not load ({error.__cause__ or error})"
    return _missing(f"{path.name} {unfit}: {_what_helps(path.parent)}")


# ---- the two libraries ----


def _find_operators(package: Path) -> Library:
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        why = f"torch {torch.__version__} is older than {oldest}, the oldest that the libraries load in"
        return _missing(f"{why}: pip install -U 'torch>={oldest}'")
    path, note = package / OPERATORS, package / WHY_NOT_BUILT
    if not path.is_file():
        path = next(package.parent.glob(BY_KERNEL_BUILDER), path)
    if path.is_file():
        taken = _why_taken(path)
        return _load(path, TELL_OPERATORS) if taken is None else _missing(taken)
    reason = f"{note.read_text().strip()}; " if note.is_file() else ""
    return _missing(f"{OPERATORS} is not built: {reason}{_what_helps(package)}")


def _find_cuda(package: Path, operators: Library) -> Library:
    if operators.why_missing is not None:
        return _missing(operators.why_missing)  # the schemas are there
    if operators.path is not None and operators.path.match(BY_KERNEL_BUILDER) and torch.version.cuda is not None:
        return _load(operators.path, TELL_CUDA)
    built = sorted(re.findall(r"\d+", path.name)[0] for path in package.glob(CUDA.format("[0-9]*")))
    versions = " or ".join(f"CUDA {major}" for major in built) or "CUDA"
    if torch.version.hip is not None:
        return _missing(f"this torch is built for ROCm {torch.version.hip}, without CUDA: the backend for it is triton")
    if torch.version.cuda is None:
        return _missing(f"this torch is built without CUDA: install one that is built with {versions}")
    if not built:
        return _missing(
            "this package has no CUDA kernels (build_info().cuda is None): rebuild where there is nvcc; "
            "RWKV_KERNELS_CUDA=1 makes the build say what it lacks"
        )
    major = torch.version.cuda.split(".")[0]
    if major not in built:
        return _missing(
            f"torch is built with CUDA {torch.version.cuda}, and the CUDA kernels of this package are for {versions}: "
            f"install a torch that is built with {versions}, or rebuild where there is an nvcc of CUDA {major}"
        )
    return _load(package / CUDA.format(major), TELL_CUDA)


operators = _find_operators(PACKAGE)
cuda = _find_cuda(PACKAGE, operators)
# Of the operators in torch.ops; the package's own name without a library, which no other copy of it has.
NAMESPACE: str = operators.info.get("namespace", re.sub(r"\W", "_", __name__.rpartition(".")[0]))
