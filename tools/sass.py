"""Reads the machine code that nvdisasm lists."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

SECTION = re.compile(r"^//-+ \.text\.(\S+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
LABEL = re.compile(r"(\.L\w+):")
BRANCH_TARGET = re.compile(r"\bBRA\b.*?(\.L\w+)")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Access(NamedTuple):
    """To memory, by one thread."""

    instruction: str  # LDG, STG, LDS, STS, or LDGSTS, which copies from global to shared memory
    width: int  # bytes


def access_of(name: str) -> Access | None:
    """What an instruction such as LDG.E.128 accesses, or None."""
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
        """How often each kind of access is in the code."""
        return Counter(access for name in self.names if (access := access_of(name)))


def innermost_loops(listing: str) -> Iterator[Code]:
    """The loops of a kernel that have none inside, each ending in its branch back."""
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
