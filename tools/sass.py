"""Machine code of NVIDIA's GPUs: the programs that read it, and counts of its instructions."""

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SECTION = re.compile(r"^//-+ \.text\.(\S+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
LABEL = re.compile(r"(\.L\w+):")
BRANCH_TARGET = re.compile(r"\bBRA\b.*?(\.L\w+)")
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


# ---- the programs ----


def output(*command: str | Path, cwd: Path | None = None) -> str:
    """The standard output of a program; ends this one with its complaint if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if result.returncode != 0:
        sys.exit(f"kernel report: {' '.join(map(str, command))} fails\n{result.stderr}")
    return result.stdout


def program(name: str) -> Path:
    """A program from Triton's package: not every toolkit has them."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        sys.exit(f"kernel report: {name} comes with the package triton, which is not installed")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name


def resources(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of every kernel, by its mangled name."""
    text = output(program("cuobjdump"), "-res-usage", cubin)
    return {name: (int(registers), int(stack)) for name, registers, stack in RESOURCES.findall(text)}


def listing(cubin: Path) -> str:
    """The machine code of all kernels."""
    return output(program("nvdisasm"), "-c", cubin)


# ---- listings of nvdisasm ----


class Access(NamedTuple):
    """An access to memory by one thread."""

    instruction: str  # LDG, STG, LDS, STS, or LDGSTS, which copies from global to shared memory
    width: int  # bytes


def access_of(name: str) -> Access | None:
    """The access of an instruction such as LDG.E.128, or None."""
    base, *suffixes = name.split(".")
    if base not in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
        return None
    return Access(base, next((WIDTHS[suffix] for suffix in suffixes if suffix in WIDTHS), 4))


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, in the order of the listing."""

    names: list[str]

    @property
    def instructions(self) -> int:
        """All but those that fill the last line of code."""
        return sum(name != "NOP" for name in self.names)

    @property
    def mufu(self) -> int:
        """Those on the unit of special functions."""
        return sum(name.startswith("MUFU") for name in self.names)

    @property
    def accesses(self) -> Counter[Access]:
        """The number of each kind of access in the code."""
        return Counter(access for name in self.names if (access := access_of(name)))


def innermost_loops(listing: str) -> Iterator[Code]:
    """The innermost loops of a kernel, each ending in its branch back."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := INSTRUCTION.match(line):
            names.append(instruction[1])
            target = BRANCH_TARGET.search(line)
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
    for start, end in loops:
        if not any(start <= other_start and other_end < end for other_start, other_end in loops):
            yield Code(names[start:end])


def kernels(listing: str) -> Iterator[tuple[str, Code]]:
    """Every kernel of a listing with its mangled name."""
    parts = SECTION.split(listing)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        yield name, Code(INSTRUCTION.findall(text))
