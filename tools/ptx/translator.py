"""Translates a kernel to C++: registers become variables, braces, labels and branches stay."""

from collections import ChainMap, Counter
from dataclasses import dataclass, field

from .instructions import c_name, code_of
from .parser import Instruction, Label, PtxError, Registers, Source, Variable, parse


@dataclass(frozen=True)
class Translation:
    """`blocks` are the opcodes of each stretch of code without a branch, which `counts` in the C++ count."""

    source: Source
    code: str
    blocks: list[Counter[str]]
    shared_bytes: int  # without those of the launch
    local_bytes: int


def translate(text: str, name: str, counted: bool) -> Translation:
    """The only kernel of the PTX whose name contains `name`; with `counted` it counts the opcodes that it executes."""
    return _Translator(parse(text, name), counted).translation()


@dataclass
class _Translator:
    source: Source
    counted: bool
    types: ChainMap[str, str] = field(default_factory=ChainMap)  # of registers, by braces
    lines: list[str] = field(default_factory=list)
    blocks: list[Counter[str]] = field(default_factory=list)
    shared_bytes: int = 0
    local_bytes: int = 0

    def translation(self) -> Translation:
        for parameter in self.source.parameters:
            self._constant(parameter.name, f"u64(parameters) + {parameter.offset}")
        self._place_shared()
        in_block = False
        for statement in self.source.statements:
            if isinstance(statement, Instruction):
                if not in_block:
                    if self.counted:
                        self.lines.append(f"counts[{len(self.blocks)}]++;")
                    self.blocks.append(Counter())
                self.blocks[-1][statement.opcode] += 1
                self.lines.append(self._instruction(statement))
                in_block = statement.opcode.split(".")[0] not in ("bra", "ret", "exit")
            elif isinstance(statement, Label):
                self.lines.append(f"{c_name(statement.name)}:;")
                in_block = False
            elif isinstance(statement, Registers):
                self.types.update(dict.fromkeys(statement.names, statement.type))
                self.lines.append(f"{statement.type} {', '.join(map(c_name, statement.names))};")
            elif isinstance(statement, Variable):
                self._declare_local(statement)
            else:
                self.types = self.types.new_child() if statement == "{" else self.types.parents
                self.lines.append(statement)
        code = [
            '#include "machine.h"',
            f"static u64 counts[{len(self.blocks)}];",
            "static void kernel(Thread* t, const char* parameters) {",
            *self.lines,
            "}",
            'extern "C" u64* executed() { return counts; }',
        ]
        return Translation(self.source, "\n".join(code) + "\n", self.blocks, self.shared_bytes, self.local_bytes)

    def _constant(self, name: str, value: str) -> None:
        self.types[name] = "u64"
        self.lines.append(f"const u64 {c_name(name)} = {value};")

    def _place_shared(self) -> None:
        declared = [variable for variable in self.source.statements if isinstance(variable, Variable)]
        variables = self.source.shared + [variable for variable in declared if variable.space == "shared"]
        # Memory that the launch adds comes last.
        for variable in sorted(variables, key=lambda variable: variable.bytes == 0):
            offset = -(-self.shared_bytes // variable.alignment) * variable.alignment
            self._constant(variable.name, str(offset))
            self.shared_bytes = offset + variable.bytes

    def _declare_local(self, variable: Variable) -> None:
        if variable.space == "local":
            self.local_bytes += variable.bytes + variable.alignment
            memory = f"{c_name(variable.name)}_memory"
            self.lines.append(f"alignas({variable.alignment}) char {memory}[{variable.bytes}];")
            self._constant(variable.name, f"u64({memory})")

    def _instruction(self, instruction: Instruction) -> str:
        try:
            return code_of(instruction, self.types)
        except (PtxError, KeyError, IndexError, ValueError, StopIteration) as error:
            text = f"{instruction.opcode} {', '.join(instruction.operands)}"
            raise PtxError(f"line {instruction.line}: {text!r} cannot be translated: {error!r}") from error
