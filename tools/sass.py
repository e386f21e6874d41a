"""Reads the machine code that nvdisasm lists, and counts what a thread executes of it for a full tile.

A kernel's tile loop is its largest loop, and its body forks: full spans and partial ones, shared exponent and running
maximum, vectors and single elements. A full tile takes the path

- that moves exactly its vectors between global and shared memory, for every tensor,
- and of those paths one with the most other accesses to shared memory, so that no step is left out,
- and of those the shortest: partial spans and the running maximum access the same in more instructions.

Loops that copy vectors take the turns that this needs. Others, over the spans of a block, are counted once, with the
remainder that the compiler split off.
"""

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

SECTION = re.compile(r"^//-+ \.text\.(\S+)", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")
TARGET = re.compile(r"\.L_x_\d+")
CONDITION = re.compile(r"\s*!?U?P\d")

WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Access(NamedTuple):
    """To memory, by one thread."""

    instruction: str  # LDG, STG, LDS, STS, or LDGSTS, which copies from global to shared memory
    width: int  # bytes

    @property
    def is_vector(self) -> bool:
        """Whether it is to global memory and of 16 bytes."""
        return self.width == 16 and "G" in self.instruction


class Cost(NamedTuple):
    """What is executed of a kernel."""

    instructions: int
    mufu: int  # on the unit of special functions


def access_of(name: str) -> Access | None:
    """What an instruction such as LDG.E.128 accesses, or None."""
    base, *suffixes = name.split(".")
    if base not in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
        return None
    return Access(base, next((WIDTHS[suffix] for suffix in suffixes if suffix in WIDTHS), 4))


@dataclass
class BasicBlock:
    """Instructions that run one after the other; `successors` are numbers of blocks."""

    names: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    predicated_vectors: int = 0

    @cached_property
    def accesses(self) -> list[Access]:
        """Every access to memory, in order."""
        return [access for name in self.names if (access := access_of(name))]

    @cached_property
    def vectors(self) -> range:
        """How many are copied between global and shared memory; some may be predicated."""
        most = sum(access.is_vector for access in self.accesses)
        return range(most - self.predicated_vectors, most + 1)

    @cached_property
    def copies(self) -> bool:
        """Whether it copies vectors at all."""
        return self.vectors[-1] > 0

    @cached_property
    def is_narrow(self) -> bool:
        """Whether it accesses global memory in less than 16 bytes."""
        return any(access.width < 16 and "G" in access.instruction for access in self.accesses)

    @cached_property
    def cost(self) -> Cost:
        """Of one execution."""
        return Cost(len(self.names), sum(name.startswith("MUFU") for name in self.names))

    def steps(self, widths: tuple[int, ...]) -> int:
        """Accesses to shared memory of these widths, but for those that staging comes with."""
        if self.copies or self.is_narrow:
            return 0
        return sum(access.width in widths for access in self.accesses)


@dataclass(frozen=True)
class Code:
    """A kernel's basic blocks, in the order of the listing."""

    blocks: list[BasicBlock]

    @property
    def cost(self) -> Cost:
        """Of everything once."""
        return Cost(*(sum(part) for part in zip(*(block.cost for block in self.blocks), strict=True)))

    @property
    def accesses(self) -> Counter[Access]:
        """How often each kind of access is in the code."""
        return Counter(access for block in self.blocks for access in block.accesses)

    def of_full_tile(self, vectors: int, widths: tuple[int, ...]) -> Cost | None:
        """What a thread executes in one turn of the tile loop, or None where there is no such loop.

        `vectors` of 16 bytes are what the thread moves of a tile of one tensor, `widths` the bytes by which it accesses
        tiles and states in shared memory.
        """
        back_edges = self._back_edges()
        loops = self._loops(back_edges)
        header, body = max(loops.items(), key=lambda item: self._size(item[1]), default=(0, set[int]()))
        tensors = self._tensors(body)
        copying = {h for h, loop in loops.items() if h != header and loop < body and loop & tensors.keys()}
        if not tensors:
            return None
        last = max(tensors.values())

        Place = tuple[int, int, int]  # a block, the tensor that was copied last, and how many of its vectors were
        start = (header, -1, vectors)
        best: dict[Place, tuple[int, Place | None]] = {start: (0, None)}
        ends: list[tuple[int, Place]] = []
        todo = deque([start])
        while todo:
            place = todo.popleft()
            i, tensor, moved = place
            length = best[place][0] + len(self.blocks[i].names) - 1_000_000 * self.blocks[i].steps(widths)
            if (i, header) in back_edges and tensor == last and moved == vectors:
                ends.append((length, place))
            for successor in self.blocks[i].successors:
                if successor not in body or ((i, successor) in back_edges and successor not in copying):
                    continue
                entered, before = tensors.get(successor, tensor), moved
                if entered != tensor:
                    if entered != tensor + 1 or moved != vectors:
                        continue
                    before = 0
                for count in self.blocks[successor].vectors:
                    after = (successor, entered, before + count)
                    if after[2] <= vectors and (after not in best or length < best[after][0]):
                        best[after] = (length, place)
                        todo.append(after)
        if not ends:
            return None
        path: list[Cost] = []
        step: Place | None = min(ends)[1]
        while step is not None:
            path.append(self.blocks[step[0]].cost)
            step = best[step][1]
        return Cost(sum(cost.instructions for cost in path), sum(cost.mufu for cost in path))

    def _tensors(self, body: set[int]) -> dict[int, int]:
        """Of blocks that copy vectors, which tensor: the code for single elements separates one from the next."""
        tensors: dict[int, int] = {}
        tensor, narrow = -1, True
        for i in sorted(body):
            if self.blocks[i].copies:
                tensor += narrow
                narrow = False
                tensors[i] = tensor
            narrow |= self.blocks[i].is_narrow
        return tensors

    def _size(self, loop: set[int]) -> int:
        return sum(len(self.blocks[i].names) for i in loop)

    def _back_edges(self) -> set[tuple[int, int]]:
        """Edges to a block that a search in depth is still inside of."""
        back, inside, seen = set(), {0}, {0}
        stack = [(0, iter(self.blocks[0].successors))]
        while stack:
            block, successors = stack[-1]
            successor = next(successors, None)
            if successor is None:
                inside.remove(block)
                stack.pop()
            elif successor in inside:
                back.add((block, successor))
            elif successor not in seen:
                seen.add(successor)
                inside.add(successor)
                stack.append((successor, iter(self.blocks[successor].successors)))
        return back

    def _loops(self, back_edges: set[tuple[int, int]]) -> dict[int, set[int]]:
        """The blocks of each loop, by the block that it begins with."""
        predecessors: dict[int, list[int]] = {i: [] for i in range(len(self.blocks))}
        for i, block in enumerate(self.blocks):
            for successor in block.successors:
                predecessors[successor].append(i)
        loops: dict[int, set[int]] = {}
        for end, header in back_edges:
            loop = loops.setdefault(header, {header})
            todo = [end]
            while todo:
                i = todo.pop()
                if i not in loop:
                    loop.add(i)
                    todo += predecessors[i]
        return loops


def kernels(listing: str) -> Iterator[tuple[str, Code]]:
    """Every kernel of a listing with its mangled name."""
    parts = SECTION.split(listing)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        yield name, Code(_basic_blocks(text))


def _basic_blocks(text: str) -> list[BasicBlock]:
    blocks = [BasicBlock()]
    first_at: dict[str, int] = {}
    targets: dict[int, list[str]] = {}
    stops: set[int] = set()
    for line in text.splitlines():
        if label := LABEL.match(line):
            if blocks[-1].names:
                blocks.append(BasicBlock())
            first_at[label[1]] = len(blocks) - 1
        elif instruction := INSTRUCTION.match(line):
            guard, name, rest = instruction.groups()
            blocks[-1].names.append(name)
            access = access_of(name)
            blocks[-1].predicated_vectors += bool(guard and access and access.is_vector)
            if name.split(".")[0] in ("BRA", "BRX", "EXIT", "RET"):
                last = len(blocks) - 1
                targets[last] = TARGET.findall(rest)
                if not (guard or CONDITION.match(rest) or ".DIV" in name):
                    stops.add(last)
                blocks.append(BasicBlock())
    for i, block in enumerate(blocks):
        block.successors += [first_at[label] for label in targets.get(i, [])]
        if i not in stops and i + 1 < len(blocks):
            block.successors.append(i + 1)
    return blocks
