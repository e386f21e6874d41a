"""What the compiler makes of the CUDA kernels: `make kernel-report` writes docs/kernel-report.md; no GPU is needed.

Registers and occupancy for every architecture; for two of them memory accesses, and the instructions for each element
of a full tile. Fails if a kernel has a stack frame, which is where registers are spilled to, or more code than it may.

`make kernel-check` fails for the same reasons and writes nothing. Either takes LIBRARY=librwkv_kernels_cuda13.so, whose
machine code is then read instead of compiled again, which is four fifths of the time.
"""

import argparse
import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cuda_toolkit
import sass

from rwkv_kernels import _introspection

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "wkv_kernels.cu"
REPORT = ROOT / "docs" / "kernel-report.md"

COMPILERS = 2  # at a time

# Of these the report counts instructions.
DISASSEMBLED = ("8.0", "9.0")
# Of this one the instructions are limited.
LIMITED = "9.0"

# What a block is like does not depend on much more than the dtype.
PROBLEM = (8, 1024, 768)
SCHEDULES = ("chunked", "single_pass")


@dataclass(frozen=True)
class Device:
    """A GPU of each architecture, and what bounds the blocks on one of its multiprocessors.

    CUDA C++ Programming Guide, table of compute capabilities.
    """

    name: str
    multiprocessors: int
    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024  # of shared memory for each block
    registers: int = 65536

    def limits(self) -> dict[str, int]:
        """What a plan asks of a device."""
        return {
            "multiprocessors": self.multiprocessors,
            "shared_per_block": self.shared_bytes - self.reserved_bytes,
            "shared_per_multiprocessor": self.shared_bytes,
        }

    def blocks_that_fit(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Of one kernel, at the same time."""
        registers_of_warp = -(-registers * 32 // 256) * 256
        warps = self.registers // registers_of_warp // 4 * 4  # each of four schedulers has registers of its own
        shared_of_block = shared_bytes + self.reserved_bytes
        return min(
            self.blocks,
            self.threads // threads,
            warps // -(-threads // 32),
            self.shared_bytes // shared_of_block if shared_of_block else self.blocks,
        )


DEVICES = {
    "7.5": Device("T4", 40, 1024, 16, 64 * 1024, reserved_bytes=0),
    "8.0": Device("A100", 108, 2048, 32, 164 * 1024),
    "8.6": Device("A10", 72, 1536, 16, 100 * 1024),
    "8.9": Device("L4", 58, 1536, 24, 100 * 1024),
    "9.0": Device("H100", 132, 2048, 32, 228 * 1024),
    "10.0": Device("B200", 148, 2048, 32, 228 * 1024),
    "12.0": Device("RTX 5090", 170, 1536, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel; the names are those of the launches."""

    name: str
    dtype: str
    registers: int
    stack_bytes: int
    code: sass.Code | None
    code_of_full_tile: sass.Code | None


Codes = dict[tuple[str, str], sass.Code]


@dataclass(frozen=True)
class Block:
    """How the operators launch a kernel, and how much of the problem one thread has of a full tile."""

    threads: int
    shared_bytes: int
    elements: int


NAMES = {
    ("Forward", "0"): "summarise_states",
    ("Forward", "1"): "forward",
    ("Forward", "2"): "forward_single_pass",
    ("CarryStates", None): "carry_states",
    ("Backward", "0"): "summarise_adjoints",
    ("Backward", "1"): "backward",
    ("Backward", "2"): "backward_single_pass",
    ("CarryAdjoints", None): "carry_adjoints",
    ("Reduce", None): "reduce",
    ("Clear", None): "clear",
    ("Step", None): "step",
}
WALKS = ("forward", "backward", "summarise")
# Instructions of a full tile for each of its elements, all code of a kernel for 9.0: what a block does besides walking
# shall stay small.
CODE_LIMITS = {
    ("forward_single_pass", "bfloat16"): 48,
    ("forward_single_pass", "float32"): 45,
    ("backward_single_pass", "bfloat16"): 100,
    ("backward_single_pass", "float32"): 98,
}
DTYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_8Bfloat16E": "bfloat16", "d": "float64"}
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
MANGLED = re.compile(
    r"wkv_kernelINS_\d+(Clear|[A-Z][A-Za-z]*(?=I))(?:I(f|d|NS_4HalfE|NS_8Bfloat16E)(?:LNS_4PassE([012])E)?E)?"
)


def identity(mangled: str) -> tuple[str, str]:
    """Name and dtype of a kernel."""
    match = MANGLED.search(mangled)
    if match is None:
        sys.exit(f"kernel report: which kernel is {mangled}?")
    program, element, flag = match.groups()
    return NAMES[program, flag], DTYPES[element or "f"]


# ---- machine code: compiled here, or out of a library ----


@dataclass(frozen=True)
class Tools:
    """What compiles and reads machine code, and a folder for it."""

    toolkit: cuda_toolkit.Toolkit
    nvdisasm: Path
    cuobjdump: Path
    folder: Path

    def compile(self, architecture: str, *macros: str) -> Path:
        """The kernels of one architecture, compiled as the library compiles them."""
        cubin = self.folder / f"{architecture}{''.join(macros)}.cubin"
        flags = [f for f in cuda_toolkit.nvcc_flags([architecture]) if not f.startswith("-gencode")]
        target = f"-arch=sm_{architecture.replace('.', '')}"
        _output(self.toolkit.nvcc, *flags, *macros, target, "-cubin", SOURCE, "-o", cubin)
        return cubin

    def full_tiles(self, architecture: str) -> Codes:
        """The code for full tiles that share an exponent, and no other."""
        return self.disassemble(self.compile(architecture, "-DWKV_FULL_TILES_ONLY"))

    def extract(self, library: Path) -> dict[str, Path]:
        """The kernels of every architecture that a library has been built for."""
        _output(self.cuobjdump, "-xelf", "all", library.resolve(), cwd=self.folder)
        found = {}
        # nvcc's own linker leaves a second one for each architecture, which is small and has no kernels.
        for path in sorted(self.folder.glob("*.sm_*.cubin"), key=lambda path: path.stat().st_size):
            number = path.suffixes[-2].removeprefix(".sm_")
            found[f"{number[:-1]}.{number[-1]}"] = path
        return found

    def resources(self, cubin: Path) -> dict[tuple[str, str], tuple[int, int]]:
        """Registers and bytes of stack of every kernel."""
        listing = _output(self.cuobjdump, "-res-usage", cubin)
        return {identity(name): (int(registers), int(stack)) for name, registers, stack in RESOURCES.findall(listing)}

    def disassemble(self, cubin: Path) -> Codes:
        """The instructions of every kernel."""
        return {identity(mangled): code for mangled, code in sass.kernels(_output(self.nvdisasm, "-c", cubin))}


def _output(*command: str | Path, cwd: Path | None = None) -> str:
    """What a program prints; ends this one with what it says if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if result.returncode != 0:
        sys.exit(f"kernel report: {' '.join(map(str, command))} fails\n{result.stderr}")
    return result.stdout


def kernels(tools: Tools, library: Path | None, disassembled: Iterable[str]) -> dict[str, list[Kernel]]:
    """Every kernel, by architecture; code is counted for some architectures, that of full tiles for one more."""
    disassembled = tuple(disassembled)
    with ThreadPoolExecutor(COMPILERS) as pool:
        full_tiles = {name: pool.submit(tools.full_tiles, name) for name in dict.fromkeys((*disassembled, LIMITED))}
        cubins = (
            tools.extract(library) if library else dict(zip(DEVICES, pool.map(tools.compile, DEVICES), strict=True))
        )
        if missing := DEVICES.keys() - cubins.keys():
            sys.exit(f"kernel report: {library} has no code for {', '.join(sorted(missing))}")
        resources = dict(zip(DEVICES, pool.map(tools.resources, map(cubins.__getitem__, DEVICES)), strict=True))
        codes = dict(zip(disassembled, pool.map(tools.disassemble, map(cubins.__getitem__, disassembled)), strict=True))
        full = {name: future.result() for name, future in full_tiles.items()}
    return {
        name: [
            Kernel(*key, *used, codes.get(name, {}).get(key), full.get(name, {}).get(key))
            for key, used in found.items()
        ]
        for name, found in resources.items()
    }


# ---- the report ----


def blocks(device: Device) -> dict[tuple[str, str], Block]:
    """The blocks that the operators launch on a device, by kernel and dtype."""
    sizes = [f"{name}_{axis}_stride" for name in ("k", "v", "gy") for axis in ("batch", "time")]
    sizes += ["k_stride", "v_stride", "r_stride", *(f"state_{axis}_stride" for axis in ("batch", "row", "channel"))]
    nowhere: dict[str, int | str] = {**dict.fromkeys(sizes, 0), "w_dtype": "float32", "u_dtype": "float32"}
    found = {}
    for dtype in DTYPES.values():
        schedules = SCHEDULES if dtype != "float64" else SCHEDULES[:1]
        for operation, schedule in itertools.product(("forward", "backward", "step"), schedules):
            tile = 0
            if operation != "step":
                plan = _introspection.plan_cuda(operation, dtype, *PROBLEM, device.limits(), schedule=schedule)
                tile = plan["tile_steps"] * -(-PROBLEM[2] // plan["channel_tiles"])
            for launch in _introspection.cuda_launches(
                operation, dtype, *PROBLEM, nowhere, device.limits(), schedule=schedule
            ):
                threads = launch["block"][0]
                found[launch["kernel"], dtype] = Block(threads, launch["shared_bytes"], tile // threads)
    return found


COLUMNS = ("kernel", "dtype", "registers", "stack", "shared", "threads", "blocks")
CODE_COLUMNS = ("kernel", "dtype", "instructions", "MUFU", "instructions / element", "MUFU / element", "accesses")

PREFACE = """# What the compiler makes of the CUDA kernels

`make kernel-report`, nvcc {version}. Bytes are of a thread's stack frame, where spilled registers would be, and of a
block's shared memory; blocks are those that fit on a multiprocessor. Threads and shared memory are those of the
launches for B, T, C = {problem} on the GPU that is named for the architecture.

Accesses are counted in the code, which has full and partial spans, the shared exponent and the running maximum. For
"per element" the kernels are compiled once more for full tiles that share an exponent, and all instructions of that
code, the block's beginning and end and one turn of each loop included, are divided by a thread's elements of a tile.
"""


def report(compiled: dict[str, list[Kernel]], version: str) -> str:
    """All tables as Markdown."""
    parts = [PREFACE.format(version=version, problem=", ".join(map(str, PROBLEM)))]
    for architecture, found in compiled.items():
        ordered = sorted(found, key=lambda kernel: (list(NAMES.values()).index(kernel.name), kernel.dtype))
        device = DEVICES[architecture]
        launched = blocks(device)
        blocks_of = [(kernel, launched[kernel.name, kernel.dtype]) for kernel in ordered]
        rows = [_resource_row(kernel, block, device) for kernel, block in blocks_of]
        parts.append(f"## {architecture}\n\n{device.name}, {device.multiprocessors} multiprocessors.\n")
        parts.append(f"{_markdown(COLUMNS, rows)}\n")
        if architecture in DISASSEMBLED:
            rows = [_code_row(kernel, kernel.code, block) for kernel, block in blocks_of if kernel.code is not None]
            parts.append(f"{_markdown(CODE_COLUMNS, rows)}\n")
    return "\n".join(parts)


def _resource_row(kernel: Kernel, block: Block, device: Device) -> tuple[object, ...]:
    fit = device.blocks_that_fit(block.threads, kernel.registers, block.shared_bytes)
    resources = (kernel.registers, kernel.stack_bytes, block.shared_bytes, block.threads, fit)
    return (kernel.name, kernel.dtype, *resources)


def _code_row(kernel: Kernel, code: sass.Code, block: Block) -> tuple[object, ...]:
    full = kernel.code_of_full_tile
    per_element: tuple[object, object] = ("", "")
    if full is not None and kernel.name.startswith(WALKS):
        per_element = (f"{full.instructions / block.elements:.1f}", f"{full.mufu / block.elements:.1f}")
    accesses = (f"{count} {access.instruction}.{8 * access.width}" for access, count in sorted(code.accesses.items()))
    return (kernel.name, kernel.dtype, code.instructions, code.mufu, *per_element, ", ".join(accesses))


def _markdown(names: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _compiled_as(name: str, dtype: str) -> tuple[str, str]:
    """Kernels that see states alone are the same for every dtype whose states are float32."""
    return (name, dtype if name.startswith((*WALKS, "step")) or dtype == "float64" else "float32")


def complaints(compiled: dict[str, list[Kernel]]) -> Iterator[str]:
    """Kernels that keep values in local memory, those of more code than they may have, and those that are not there."""
    for architecture, found in compiled.items():
        launched = blocks(DEVICES[architecture])
        for name, dtype in {_compiled_as(*key) for key in launched} - {(kernel.name, kernel.dtype) for kernel in found}:
            yield f"{name} {dtype} for {architecture}: launched and not compiled"
        for kernel in found:
            name = f"{kernel.name} {kernel.dtype} for {architecture}"
            if kernel.stack_bytes:
                yield f"{name}: a stack frame of {kernel.stack_bytes} bytes"
            limit = CODE_LIMITS.get((kernel.name, kernel.dtype))
            if architecture == LIMITED and limit is not None:
                assert kernel.code_of_full_tile is not None
                length = kernel.code_of_full_tile.instructions / launched[kernel.name, kernel.dtype].elements
                if length > limit:
                    yield f"{name}: {length:.1f} instructions per element of a full tile, more than {limit}"


def summary(architecture: str, found: list[Kernel]) -> str:
    """One line."""
    most = max(found, key=lambda kernel: kernel.registers)
    on_stack = sum(kernel.stack_bytes > 0 for kernel in found)
    return (
        f"{architecture}: {len(found)} kernels, {most.registers} registers at most ({most.name} {most.dtype}), "
        f"{on_stack or 'none'} with a stack frame"
    )


def find_cuobjdump() -> Path:
    """The reader of CUDA libraries, which Triton brings along where the toolkit has none."""
    if on_path := cuda_toolkit.find_program("cuobjdump"):
        return Path(on_path)
    triton = importlib.util.find_spec("triton")
    bundled = (
        Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton and triton.origin else None
    )
    if bundled is None or not bundled.exists():
        sys.exit("kernel report: cuobjdump is neither on the PATH nor in the toolkit nor in the package triton")
    return bundled


def find_nvdisasm() -> Path:
    """The disassembler, which is a package of requirements.txt and not part of every toolkit."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        sys.exit("kernel report: the package nvidia-cuda-nvdisasm is missing")
    return next(Path(str(file.locate())) for file in files if file.name == "nvdisasm")


def main() -> None:
    """Compiles or reads, complains, and writes the report unless only a check is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write no report")
    parser.add_argument("--library", type=Path, help="read its machine code instead of compiling")
    arguments = parser.parse_args()
    toolkit = cuda_toolkit.find_toolkit()
    if toolkit is None:
        print("kernel report: nvcc is neither in CUDA_HOME nor on the PATH, so there is nothing to report")
        return
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(toolkit, find_nvdisasm(), find_cuobjdump(), Path(folder))
        compiled = kernels(tools, arguments.library, () if arguments.check else DISASSEMBLED)
    for architecture, found in compiled.items():
        print(summary(architecture, found))
    if not arguments.check:
        REPORT.write_text(report(compiled, toolkit.version))
    if wrong := sorted(complaints(compiled)):
        sys.exit("kernel report:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
