"""Translates one instruction of PTX to C++, which calls values.h and machine.h."""

import math
import re
import struct
from collections.abc import Callable, Collection, Mapping

from .parser import BYTES, Instruction, PtxError, split

# Expressions of the operands a, b, c and d, which have the instruction's type T or the types that OPERANDS names.
EXPRESSIONS = {
    "mov": "a",
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "mul.lo": "a * b",
    "mul.hi": "T(Wide<T>(a) * Wide<T>(b) >> 8 * sizeof(T))",
    "mul.wide": "Wide<T>(a) * Wide<T>(b)",
    "mad.lo": "a * b + c",
    "mad.wide": "Wide<T>(a) * Wide<T>(b) + c",
    "fma": "std::fma(a, b, c)",
    "div": "a / b",
    "rem": "remainder(a, b)",
    "min": "minimum(a, b)",
    "max": "maximum(a, b)",
    "abs": "a < 0 ? -a : a",
    "neg": "-a",
    "and": "a & b",
    "or": "a | b",
    "xor": "a ^ b",
    "not": "a ^ T(-1)",
    "shl": "shift_left(a, b)",
    "shr": "shift_right(a, b)",
    "bfe": "extract(a, b, c)",
    "bfi": "insert(a, b, c, d)",
    "selp": "c ? a : b",
    "sqrt": "std::sqrt(a)",
    "rsqrt": "T(1 / std::sqrt(f64(a)))",
    "rcp": "1 / a",
    "ex2": "std::exp2(a)",
    "lg2": "std::log2(a)",
}
OF_FLOATS = {"abs": "std::fabs(a)"}
OF_INTEGERS = {"div": "quotient(a, b)"}
FLOATS = {"f32": "f", "f64": "d"}  # by the codes of struct
HALVES = ("f16", "bf16")
# In float32, then rounded to halves: the same results as in halves.
EXACT_IN_FLOAT = ("add", "sub", "mul", "min", "max", "abs", "neg")
OPERANDS = {
    "mad.wide": ("T", "T", "Wide<T>"),
    "shl": ("T", "u32"),
    "shr": ("T", "u32"),
    "bfe": ("T", "u32", "u32"),
    "bfi": ("T", "T", "u32", "u32"),
    "selp": ("T", "T", "pred"),
}
# Without "u" both operands are numbers; with it one may be NaN.
COMPARISONS = {
    "eq": "a == b",
    "ne": "a < b || a > b",
    "lt": "a < b",
    "le": "a <= b",
    "gt": "a > b",
    "ge": "a >= b",
    "equ": "!(a < b || a > b)",
    "neu": "a != b",
    "ltu": "!(a >= b)",
    "leu": "!(a > b)",
    "gtu": "!(a <= b)",
    "geu": "!(a < b)",
    "num": "a == a && b == b",
    "nan": "a != a || b != b",
}
JOINED = {"and": "&", "or": "|", "xor": "^"}
# The value to store; a is the one in memory.
ATOMICS = {name: EXPRESSIONS[name] for name in ("add", "min", "max", "and", "or", "xor")} | {
    "exch": "b",
    "cas": "a == b ? c : a",
}
VOTES = {
    "all": "votes.yes == votes.all",
    "and": "votes.yes == votes.all",
    "any": "votes.yes != 0",
    "or": "votes.yes != 0",
    "uni": "votes.yes == 0 || votes.yes == votes.all",
    "ballot": "votes.yes",
    "popc": "votes.yes",
}
SHUFFLES = ("up", "down", "bfly", "idx")
DIRECTED = {"rm": "FE_DOWNWARD", "rp": "FE_UPWARD", "rz": "FE_TOWARDZERO"}
TO_INTEGERS = {"rni": "std::nearbyint", "rmi": "std::floor", "rpi": "std::ceil", "rzi": "std::trunc"}
SPACES = {
    "global": "global_memory",
    "shared": "shared_memory",
    "param": "parameter_memory",
    "local": "generic_memory",
}
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
SPINNING = {"volatile", "relaxed", "acquire"}
ORDERING = {"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"}
CACHING = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"}
# Memory is sequentially consistent, and nothing is cached.
WITHOUT_EFFECT = ("membar", "fence", "prefetch", "prefetchu", "griddepcontrol")
SPECIAL = {"%laneid": "t->lane", "WARP_SZ": "32u"} | {
    f"%{name}.{axis}": f"{value}[{i}]"
    for name, value in {
        "tid": "t->index",
        "ntid": "launch->block",
        "ctaid": "t->block->index",
        "nctaid": "launch->grid",
    }.items()
    for i, axis in enumerate("xyz")
}


def code_of(instruction: Instruction, registers: Mapping[str, str]) -> str:
    """The statement of C++; `registers` has the types of registers and variables by their names."""
    translated = _Instruction(instruction, registers)
    if instruction.predicate is None:
        return translated.code()
    return f"if ({translated.read(instruction.predicate, 'pred')}) {{ {translated.code()} }}"


def c_name(name: str) -> str:
    """A register, variable or label of PTX in C++, where no name of the headers is like it."""
    return name.replace("%", "$") if name[0] in "%$" else f"{name}$"


def _literal(text: str, type: str) -> str:
    bits = int(text[2:], 16) if text[1:2] in ("f", "F", "d", "D") else int(text.rstrip("U"), 0) % 2**64
    if type in FLOATS:
        code = FLOATS[type]
        (value,) = struct.unpack_from(f"<{code}", struct.pack("<Q", bits))
        if math.isfinite(value):
            return f"({value.hex()}{'f' if type == 'f32' else ''})"
    return f"{type}({bits}ull)" if _is_integer(type) else f"as<{type}>({bits}ull)"


def _is_integer(type: str) -> bool:
    return type[1:].isdecimal() and type[0] in "bsu"


def _same(type: str, other: str) -> bool:
    """Whether both are the same type in C++."""
    unsigned = {f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)}
    return unsigned.get(type, type) == unsigned.get(other, other)


def _substituted(expression: str, values: dict[str, str]) -> str:
    return re.sub(r"\b[abcdT]\b", lambda name: values[name[0]], expression)


class _Instruction:
    """`type` is the last of the opcode's types; `modifiers` are the rest of it."""

    def __init__(self, instruction: Instruction, registers: Mapping[str, str]) -> None:
        self.name, *parts = instruction.opcode.split(".")
        self.types = [part for part in parts if part in BYTES]
        self.type = self.types[-1] if self.types else ""
        self.modifiers = [part for part in parts if part not in BYTES]
        self.operands = instruction.operands
        self.line = instruction.line
        self.registers = registers

    def code(self) -> str:
        special: dict[str, Callable[[], str]] = {
            "ld": self._load,
            "st": self._store,
            "atom": self._atomic,
            "red": self._atomic,
            "cp": self._copy,
            "setp": self._compare,
            "cvt": self._convert,
            "cvta": self._convert_address,
            "bar": self._barrier,
            "barrier": self._barrier,
            "vote": self._vote,
            "shfl": self._shuffle,
        }
        if self.name in special:
            return special[self.name]()
        if self.name == "mov" and any("{" in operand for operand in self.operands):
            return self._move_parts()
        if self.name == "bra":
            return f"goto {c_name(self.operands[0])};"
        if self.name in ("ret", "exit"):
            return "return;"
        if self.name == "trap":
            return f'fail(t, "trap (PTX line {self.line})");'
        if self.name == "nanosleep":
            return "sleep(t);"
        if self.name == "activemask":
            return self._set("t->warp->alive", "u32")
        if self.name in WITHOUT_EFFECT:
            return ";"
        return self._expression()

    def _allow(self, *modifiers: str) -> None:
        unknown = [modifier for modifier in self.modifiers if modifier not in modifiers]
        if unknown:
            raise PtxError(f"unknown .{' .'.join(unknown)}")

    def read(self, operand: str, type: str) -> str:
        """The operand's value as one of the type."""
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], type)}"
        if re.match(r"-?\d", operand):
            return _literal(operand, type)
        if operand in SPECIAL:
            return f"{type}({SPECIAL[operand]})"
        register, _, offset = (part.strip() for part in operand.partition("+"))
        value, found = c_name(register), self.registers[register]
        if offset:
            value = f"({value} + ({int(offset, 0)}))"
        if _same(type, found):
            return value
        extends = _is_integer(type) and _is_integer(found) and not found.startswith("s")  # with zeros
        return f"{type}({value})" if extends else f"as<{type}>({value})"

    def _pair(self, operand: str, type: str) -> list[str]:
        """The value, or those of a pair of halves."""
        if not type.endswith("x2"):
            return [self.read(operand, type)]
        return [f"as<{type.removesuffix('x2')}>({self.read(operand, 'b32')} >> {shift})" for shift in (0, 16)]

    def _set(self, value: str, type: str, target: str | None = None) -> str:
        """Sets the register to the value of the type, extended by its sign where the register is wider."""
        target = self.operands[0] if target is None else target
        if target == "_":
            return ""
        found = self.registers[target]
        if _same(type, found) or (_is_integer(type) and _is_integer(found)):
            return f"{c_name(target)} = {value};"
        return f"{c_name(target)} = as<{found}>({type}({value}));"

    def _one_of(self, names: Collection[str]) -> str:
        return next(modifier for modifier in self.modifiers if modifier in names)

    # ---- values

    def _expression(self) -> str:
        key = next((m for m in (f"{self.name}.{part}" for part in self.modifiers) if m in EXPRESSIONS), self.name)
        self._allow("rn", *DIRECTED, "approx", "full", "ftz", "sat", *key.split(".")[1:])
        element = self.type.removesuffix("x2")
        if element in HALVES and key not in EXACT_IN_FLOAT:
            raise PtxError(f"no {key} of {self.type}")
        type = "f32" if element in HALVES else self.type
        expression = (OF_FLOATS if type in ("f32", "f64") else OF_INTEGERS).get(key, EXPRESSIONS[key])
        types = [_substituted(name, {"T": self.type}) for name in OPERANDS.get(key, ("T",) * 4)]
        reads = [self._pair(operand, name) for operand, name in zip(self.operands[1:], types, strict=False)]
        mode = next((DIRECTED[modifier] for modifier in self.modifiers if modifier in DIRECTED), None)
        wrappers = [
            *(["opaque"] if mode else []),
            *(["saturate"] if "sat" in self.modifiers else []),
            *(["flush"] if self._flushes(type) else []),
            *([element] if element in HALVES else []),
        ]
        results = []
        for operands in zip(*reads, strict=True):
            flushed = [f"flush({x})" if self._flushes(type) else x for x in operands]
            widened = [f"f32({x})" if element in HALVES else x for x in flushed]
            opaque = [f"opaque({x})" if mode else x for x in widened]
            result = _substituted(expression, {"T": type, **dict(zip("abcd", opaque, strict=False))})
            for wrapper in wrappers:
                result = f"{wrapper}({result})"
            results.append(result)
        result, to = (results[0], element) if len(results) == 1 else (f"pack({', '.join(results)})", "b32")
        if mode is None:
            return self._set(result, to)
        return f"{{ fesetround({mode}); const auto x = {result}; fesetround(FE_TONEAREST); {self._set('x', to)} }}"

    def _flushes(self, type: str) -> bool:
        return type == "f32" and "ftz" in self.modifiers

    def _move_parts(self) -> str:
        target, source = self.operands
        parts = split(target if "{" in target else source)
        bits = 8 * BYTES[self.type] // len(parts)
        if "{" in target:
            sets = [self._set(f"b{bits}(x >> {i * bits})", f"b{bits}", part) for i, part in enumerate(parts)]
            return f"{{ auto x = {self.read(source, self.type)}; {' '.join(sets)} }}"
        shifted = [f"{self.type}({self.read(part, f'b{bits}')}) << {i * bits}" for i, part in enumerate(parts)]
        return self._set(" | ".join(shifted), self.type)

    def _compare(self) -> str:
        """setp.CMP[.BOOL][.ftz].TYPE p[|q], a, b[, c], or of pairs of halves, whose results go to p and q."""
        comparison = self.modifiers[0]
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(comparison, comparison)
        self._allow(self.modifiers[0], *JOINED, "ftz")
        signs = [JOINED[modifier] for modifier in self.modifiers if modifier in JOINED]
        targets = split(self.operands[0], "|")
        reads = list(zip(*(self._pair(operand, self.type) for operand in self.operands[1:3]), strict=True))
        if self._flushes(self.type):
            reads = [(f"flush({a})", f"flush({b})") for a, b in reads]
        results = [_substituted(COMPARISONS[comparison], {"a": a, "b": b}) for a, b in reads]
        if len(results) < len(targets):
            results.append(f"!({results[0]})")
        for sign in signs:
            results = [f"bool(({result}) {sign} {self.read(self.operands[3], 'pred')})" for result in results]
        if len(targets) == 1:
            return self._set(results[0], "pred", targets[0])
        sets = [self._set(name, "pred", target) for name, target in zip("pq", targets, strict=True)]
        return f"{{ const bool p = {results[0]}, q = {results[1]}; {' '.join(sets)} }}"

    def _convert(self) -> str:
        to, source = self.types[0], self.types[-1]
        self._allow("rn", "ftz", "sat", *TO_INTEGERS)
        if to in ("f16x2", "bf16x2") and source == "f32":
            high, low = (f"{to.removesuffix('x2')}({self.read(operand, 'f32')})" for operand in self.operands[1:])
            return self._set(f"pack({low}, {high})", "b32")
        if to.removesuffix("x2") in HALVES and source != "f32":
            raise PtxError(f"from {source} to {to}")
        value = self.read(self.operands[1], source)
        if source in HALVES:
            value = f"f32({value})"
        if self._flushes(source):
            value = f"flush({value})"
        for modifier in self.modifiers:
            if modifier in TO_INTEGERS:
                value = f"{TO_INTEGERS[modifier]}({value})"
        if "sat" in self.modifiers:
            if not {to, source} <= {"f32", "f64"}:
                raise PtxError(f"no saturation from {source} to {to}")
            value = f"saturate({value})"
        value = f"convert<{to}>({value})"
        return self._set(f"flush({value})" if self._flushes(to) else value, to)

    # ---- memory

    def _address(self, operand: str, bytes: int, access: str) -> str:
        space = self._space()
        address = self.read(operand.strip("[] "), "u64")
        return f'{SPACES.get(space, "generic_memory")}(t, {address}, {bytes}, {self.line}, "{access}")'

    def _space(self) -> str:
        """The state space, or "" of a generic address."""
        return next((modifier for modifier in self.modifiers if modifier.split("::")[0] in SPACES), "").split("::")[0]

    def _elements(self, operand: str) -> list[str]:
        """The elements of the vector that is loaded or stored, or the single operand."""
        hints = [modifier for modifier in self.modifiers if modifier.startswith(("L1::", "L2::"))]
        self._allow(*SPACES, "shared::cta", *VECTORS, *ORDERING, *CACHING, *hints)
        elements = split(operand)
        if len(elements) != next((VECTORS[modifier] for modifier in self.modifiers if modifier in VECTORS), 1):
            raise PtxError(f"{len(elements)} elements")
        return elements

    def _load(self) -> str:
        targets = self._elements(self.operands[0])
        size = BYTES[self.type]
        address = self._address(self.operands[1], size * len(targets), "load")
        sets = [self._set(f"load<{self.type}>(p + {i * size})", self.type, x) for i, x in enumerate(targets)]
        spin = "spin(t); " if SPINNING & {*self.modifiers} else ""
        return f"{{ {spin}const char* p = {address}; {' '.join(sets)} }}"

    def _store(self) -> str:
        values = self._elements(self.operands[1])
        size = BYTES[self.type]
        address = self._address(self.operands[0], size * len(values), "store")
        stores = [f"store(p + {i * size}, {self.read(x, self.type)});" for i, x in enumerate(values)]
        return f"{{ char* p = {address}; {' '.join(stores)} }}"

    def _atomic(self) -> str:
        operation = self._one_of(ATOMICS)
        self._allow(operation, "global", "shared", "shared::cta", *ORDERING)
        target, operands = ("_", self.operands) if self.name == "red" else (self.operands[0], self.operands[1:])
        address = self._address(operands[0], BYTES[self.type], "atomic access")
        values = {
            "a": "old",
            **dict(zip("bc", (self.read(operand, self.type) for operand in operands[1:]), strict=False)),
        }
        new = f"{self.type}({_substituted(ATOMICS[operation], values)})"
        return (
            f"{{ spin(t); char* p = {address}; auto old = load<{self.type}>(p); store(p, {new}); "
            f"{self._set('old', self.type, target)} }}"
        )

    def _copy(self) -> str:
        if self.modifiers[:2] == ["async", "commit_group"]:
            return "t->groups++;"
        if self.modifiers[:2] == ["async", "wait_group"]:
            return f"await_copies(t, {int(self.operands[0])});"
        if self.modifiers[:2] == ["async", "wait_all"]:
            return "await_all_copies(t);"
        self._allow("async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::256B")
        to, source, size = self.operands
        bytes = int(size, 0)
        to, source = (self.read(operand.strip("[] "), "u64") for operand in (to, source))
        return (
            f'copy_later(t, shared_memory(t, {to}, {bytes}, {self.line}, "store"), '
            f'global_memory(t, {source}, {bytes}, {self.line}, "load"), {bytes});'
        )

    def _convert_address(self) -> str:
        value = self.read(self.operands[1], "u64")
        if self._space() == "shared":
            return self._set(f"{value} {'-' if 'to' in self.modifiers else '+'} u64(t->block->shared)", "u64")
        return self._set(value, "u64")

    # ---- threads that meet

    def _barrier(self) -> str:
        if self.modifiers == ["warp", "sync"]:
            return f"exchange(t, {self.read(self.operands[0], 'u32')}, 0, {self.line});"
        self._allow("cta", "sync", "red", "aligned", "and", "or", "popc")
        operands, vote = self.operands, "false"
        if "red" in self.modifiers:
            operands, vote = self.operands[1:-1], self.read(self.operands[-1], "pred")
        number, threads = (self.read(operand, "u32") for operand in [*operands, "0"][:2])
        votes = f"barrier(t, {number}, {threads}, {vote}, {self.line})"
        if "red" not in self.modifiers:
            return f"{votes};"
        return f"{{ const Votes votes = {votes}; {self._set(VOTES[self._one_of(VOTES)], self.type)} }}"

    def _vote(self) -> str:
        self._allow("sync", "all", "any", "uni", "ballot")
        _, predicate, mask = self.operands
        votes = f"vote(t, {self.read(predicate, 'pred')}, {self.read(mask, 'u32')}, {self.line})"
        return f"{{ const Votes votes = {votes}; {self._set(VOTES[self._one_of(VOTES)], self.type)} }}"

    def _shuffle(self) -> str:
        self._allow("sync", *SHUFFLES)
        mode = f"SHUFFLE_{self._one_of(SHUFFLES).upper()}"
        operands = ", ".join(self.read(operand, "u32") for operand in self.operands[1:])
        target, *in_range = split(self.operands[0], "|")
        sets = [self._set("lane.first", "u32", target), *(self._set("lane.second", "pred", x) for x in in_range)]
        return f"{{ const auto lane = shuffle<{mode}>(t, {operands}, {self.line}); {' '.join(sets)} }}"
