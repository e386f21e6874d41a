"""Takes PTX text apart into a kernel's parameters, variables, labels and instructions."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

BYTES = {"pred": 1, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8} | {
    f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)
}


class PtxError(RuntimeError):
    """PTX that cannot be translated, or a fault of the kernel while it runs."""


@dataclass(frozen=True)
class Parameter:
    """`type` is that of one element, `offset` the place among all parameters, in bytes."""

    name: str
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Variable:
    """Memory of a block (space "shared") or of a thread ("local"); 0 bytes where the launch gives the size."""

    space: str
    name: str
    bytes: int
    alignment: int


@dataclass(frozen=True)
class Registers:
    """Registers of one type, for the rest of the braces that they are declared in."""

    type: str
    names: list[str]


@dataclass(frozen=True)
class Label:
    """A branch target."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """`opcode` is the name with its modifiers, `predicate` such as "%p1" or "!%p1"."""

    line: int
    predicate: str | None
    opcode: str
    operands: list[str]


Statement = Registers | Variable | Label | Instruction | str  # "{" or "}"


@dataclass(frozen=True)
class Source:
    """One kernel; `shared` are the variables outside it."""

    name: str
    parameters: list[Parameter]
    shared: list[Variable]
    statements: list[Statement]


NOT_CODE = re.compile(r"/\*.*?\*/|//[^\n]*|^\s*\.loc\b[^\n]*", re.DOTALL | re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?[^{};]*(?=\{)", re.DOTALL)
STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|((?:[^;{}]+|\{[^}]*\})*);)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)((?:\s*\[\s*\d*\s*\])*)")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s.*?([\w$%]+)\s*(?:\[\s*(\d+)\s*\])?\s*$", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@(!?[\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[{])+")


def parse(text: str, name: str) -> Source:
    """The only kernel whose name contains `name`."""
    text = NOT_CODE.sub(lambda match: "\n" * match[0].count("\n"), text)
    outside, end, found = "", 0, []
    for entry in ENTRY.finditer(text):
        outside += text[end : entry.start()]
        end = _closing_brace(text, entry.end())
        if name in entry[1]:
            found.append((entry, end))
    if len(found) != 1:
        raise PtxError(f"kernels whose names contain {name!r}: {[entry[1] for entry, _ in found]}")
    ((entry, end),) = found
    line = text.count("\n", 0, entry.end()) + 1
    statements = list(_statements(text[entry.end() + 1 : end - 1], line))
    shared = [_variable(match) for match in VARIABLE.finditer(outside)]
    return Source(entry[1], _parameters(entry[2] or ""), shared, statements)


def split(text: str, separator: str = ",") -> list[str]:
    """The elements of a vector such as {%r1, %r2}, of a pair such as %p1|%p2, or the single one."""
    return [part.strip() for part in text.strip("{} \t\n").split(separator)]


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise PtxError("a kernel does not end")


def _parameters(text: str) -> list[Parameter]:
    parameters: list[Parameter] = []
    end = 0
    for declaration in text.split(",") if text.strip() else []:
        match = PARAMETER.match(declaration.strip())
        if match is None:
            raise PtxError(f"parameter {declaration.strip()!r}")
        alignment, type, name, count = match.groups()
        offset = _aligned(end, int(alignment or BYTES[type]))
        parameters.append(Parameter(name, type, offset, BYTES[type] * int(count or 1)))
        end = offset + parameters[-1].bytes
    return parameters


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _variable(match: re.Match[str]) -> Variable:
    space, alignment, type, name, dimensions = match.groups()
    count = math.prod(int(size or 0) for size in re.findall(r"\[\s*(\d*)", dimensions))
    return Variable(space, name, BYTES[type] * count, int(alignment or BYTES[type]))


def _statements(text: str, line: int) -> Iterator[Statement]:
    text, position = text.rstrip(), 0
    while position < len(text):
        match = STATEMENT.match(text, position)
        if match is None:
            raise PtxError(f"line {line}: {text[position : position + 80].strip()!r}")
        brace, label, statement = match.groups()
        start = match.start(match.lastindex or 0)
        line += text.count("\n", position, start)
        if brace:
            yield brace
        elif label:
            yield Label(label)
        elif statement.strip():
            yield from _statement(statement.strip(), line)
        line += text.count("\n", start, match.end())
        position = match.end()


def _statement(text: str, line: int) -> Iterator[Statement]:
    if text.startswith(".pragma"):
        return
    if registers := REGISTERS.fullmatch(text):
        yield Registers(registers[1], [name for item in split(registers[2]) for name in _names(item)])
    elif variable := VARIABLE.fullmatch(text):
        yield _variable(variable)
    elif instruction := INSTRUCTION.fullmatch(text):
        predicate, opcode, operands = instruction.groups()
        yield Instruction(line, predicate, opcode, [operand.strip() for operand in OPERAND.findall(operands)])
    else:
        raise PtxError(f"line {line}: {text!r}")


def _names(item: str) -> list[str]:
    """The registers of a declaration: "%r<3>" declares %r0, %r1 and %r2."""
    numbered = re.fullmatch(r"([\w$%]+)<(\d+)>", item)
    return [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [item]
