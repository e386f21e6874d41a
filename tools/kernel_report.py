"""What the compiler makes of the CUDA kernels: `make kernel-report` writes docs/kernel-report.md; no GPU is needed.

Registers and occupancy for every architecture; for two of them the instructions for each element of a full tile, and
memory accesses. Fails if a kernel has a stack frame, which is where registers are spilled to, if fewer of its blocks
fit on a multiprocessor than shall, or if it has more code than it may.

`make kernel-check` fails for the same reasons and writes nothing. Either takes LIBRARY=librwkv_kernels_cuda13.so, whose
machine code is then read instead of compiled again, which is four fifths of the time.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cuda_toolkit
import sass

from rwkv_kernels import _introspection

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "kernels.cu"
REPORT = ROOT / "docs" / "kernel-report.md"

COMPILERS = 2  # at a time

# Of these the report counts instructions.
COUNTED = ("8.0", "9.0")
# Of this one the instructions are limited.
LIMITED = "9.0"

# A sequence that has whole tiles: blocks are the same for every such problem.
PROBLEM = (8, 1024, 768)

# Launches that need no plan: csrc/gpu/tuning.h, csrc/gpu/op.h.
TILE_CHANNELS = 64
REDUCE_THREADS, REDUCE_SHARED_BYTES = 1024, 1024 * 2 * 8
STEP_THREADS = 128


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

    def limits(self, architecture: str) -> "_introspection.DeviceLimits":
        """What a plan asks of a device."""
        return {
            "multiprocessors": self.multiprocessors,
            "shared_per_block": self.shared_bytes - self.reserved_bytes,
            "shared_per_multiprocessor": self.shared_bytes,
            "architecture": int(architecture.replace(".", "")) * 10,
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
    """A compiled kernel, by its name in kernels.def and the type of what it reads; code is that for full tiles."""

    name: str
    dtype: str
    registers: int
    stack_bytes: int
    code: sass.Code | None


Codes = dict[tuple[str, str], sass.Code]


@dataclass(frozen=True)
class Block:
    """How the operators launch a kernel, and how many elements of a full tile one thread has, if there are tiles."""

    threads: int
    shared_bytes: int
    elements: int = 0


NAMES = ("forward", "backward", "reduce", "step")
DTYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_8Bfloat16E": "bfloat16", "d": "float64"}
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
MANGLED = re.compile(r"wkv_kernelINS_\d+(Forward|Backward|Reduce|Step)I(f|d|NS_4HalfE|NS_8Bfloat16E)EE")

# Instructions and MUFU, which compute exponentials and quotients, of the code for a full tile on 9.0, for each of a
# thread's elements: what a block does besides walking shall stay small.
CODE_LIMITS = {
    ("forward", "bfloat16"): (30, 2.3),
    ("forward", "float32"): (28, 2.3),
    ("backward", "bfloat16"): (72, 2.5),
    ("backward", "float32"): (69, 2.5),
}

# Blocks of a kernel that shall fit on a multiprocessor: one works while another waits. Shared memory or registers allow
# no more in most places; a T4 has 64 KB and 1024 threads.
_FORWARD = dict.fromkeys(DEVICES, 2)
_BACKWARD_16_BITS = {**dict.fromkeys(DEVICES, 3), "7.5": 2}
LEAST_BLOCKS = {
    ("forward", "float32"): _FORWARD,
    ("forward", "float16"): _FORWARD,
    ("forward", "bfloat16"): _FORWARD,
    ("backward", "float32"): {"7.5": 1, "8.0": 2, "8.6": 2, "8.9": 2, "9.0": 3, "10.0": 2, "12.0": 2},
    ("backward", "float16"): _BACKWARD_16_BITS,
    ("backward", "bfloat16"): _BACKWARD_16_BITS,
}


def identity(mangled: str) -> tuple[str, str]:
    """Name and dtype of a kernel."""
    match = MANGLED.search(mangled)
    if match is None:
        sys.exit(f"kernel report: which kernel is {mangled}?")
    return match[1].lower(), DTYPES[match[2]]


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
        """The code for full tiles whose keys share an exponent, and no other."""
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


def kernels(tools: Tools, library: Path | None, counted: tuple[str, ...]) -> dict[str, list[Kernel]]:
    """Every kernel, by architecture, for some of them with the code for full tiles."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        full_tiles = {name: pool.submit(tools.full_tiles, name) for name in counted}
        cubins = (
            tools.extract(library) if library else dict(zip(DEVICES, pool.map(tools.compile, DEVICES), strict=True))
        )
        if missing := DEVICES.keys() - cubins.keys():
            sys.exit(f"kernel report: {library} has no code for {', '.join(sorted(missing))}")
        resources = dict(zip(DEVICES, pool.map(tools.resources, map(cubins.__getitem__, DEVICES)), strict=True))
        codes = {name: future.result() for name, future in full_tiles.items()}
    return {
        name: [Kernel(*key, *used, codes.get(name, {}).get(key)) for key, used in found.items()]
        for name, found in resources.items()
    }


# ---- the report ----


def blocks(architecture: str) -> dict[tuple[str, str], Block]:
    """The blocks that the operators launch on a device, by kernel and dtype."""
    found = {}
    for dtype in DTYPES.values():
        for operation in ("forward", "backward"):
            plan = _introspection.plan_cuda(operation, dtype, *PROBLEM, DEVICES[architecture].limits(architecture))
            elements = plan["tile_steps"] * TILE_CHANNELS // plan["threads"]
            found[operation, dtype] = Block(plan["threads"], plan["shared_bytes"], elements)
        found["step", dtype] = Block(STEP_THREADS, 0)
    for dtype in ("float32", "float64"):  # of the parts of gradients, which are as wide as states
        found["reduce", dtype] = Block(REDUCE_THREADS, REDUCE_SHARED_BYTES)
    return found


COLUMNS = ("kernel", "dtype", "registers", "stack", "shared", "threads", "blocks")
CODE_COLUMNS = ("kernel", "dtype", "instructions", "instructions / element", "MUFU / element", "accesses")

PREFACE = """# What the compiler makes of the CUDA kernels

`make kernel-report`, nvcc {version}. Bytes are of a thread's stack frame, where spilled registers would be, and of a
block's shared memory; blocks are those that fit on a multiprocessor of the GPU that is named for the architecture.
Threads and shared memory are those of the launches for B, T, C = {problem}.

For {counted} the kernels are compiled once more for full tiles whose keys share an exponent alone, and the
instructions and memory accesses of that code are counted. "Per element" divides all of it, the block's beginning and
end and one turn of each loop included, by a thread's elements of a tile.
"""


def report(compiled: dict[str, list[Kernel]], version: str) -> str:
    """All tables as Markdown."""
    problem, counted = ", ".join(map(str, PROBLEM)), " and ".join(COUNTED)
    parts = [PREFACE.format(version=version, problem=problem, counted=counted)]
    dtypes = list(DTYPES.values())
    for architecture, found in compiled.items():
        ordered = sorted(found, key=lambda kernel: (NAMES.index(kernel.name), dtypes.index(kernel.dtype)))
        device = DEVICES[architecture]
        launched = blocks(architecture)
        blocks_of = [(kernel, launched[kernel.name, kernel.dtype]) for kernel in ordered]
        parts.append(f"## {architecture}\n\n{device.name}, {device.multiprocessors} multiprocessors.\n")
        parts.append(f"{_markdown(COLUMNS, [_resource_row(kernel, block, device) for kernel, block in blocks_of])}\n")
        if architecture in COUNTED:
            rows = [_code_row(kernel, kernel.code, block) for kernel, block in blocks_of if kernel.code is not None]
            parts.append(f"{_markdown(CODE_COLUMNS, rows)}\n")
    return "\n".join(parts)


def _fitting(kernel: Kernel, block: Block, device: Device) -> int:
    return device.blocks_that_fit(block.threads, kernel.registers, block.shared_bytes)


def _resource_row(kernel: Kernel, block: Block, device: Device) -> tuple[object, ...]:
    fit = _fitting(kernel, block, device)
    return (kernel.name, kernel.dtype, kernel.registers, kernel.stack_bytes, block.shared_bytes, block.threads, fit)


def _code_row(kernel: Kernel, code: sass.Code, block: Block) -> tuple[object, ...]:
    per_element = (f"{count / block.elements:.1f}" if block.elements else "-" for count in _counts(code))
    accesses = (f"{count} {access.instruction}.{8 * access.width}" for access, count in sorted(code.accesses.items()))
    return (kernel.name, kernel.dtype, code.instructions, *per_element, ", ".join(accesses))


def _counts(code: sass.Code) -> tuple[int, int]:
    return code.instructions, code.mufu


def _markdown(names: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def complaints(compiled: dict[str, list[Kernel]]) -> Iterator[str]:
    """Kernels that keep values in local memory, leave room for too few blocks, have too much code, or are not there."""
    for architecture, found in compiled.items():
        device = DEVICES[architecture]
        launched = blocks(architecture)
        for name, dtype in launched.keys() - {(kernel.name, kernel.dtype) for kernel in found}:
            yield f"{name} {dtype} for {architecture}: launched and not compiled"
        for kernel in found:
            key = (kernel.name, kernel.dtype)
            name = f"{kernel.name} {kernel.dtype} for {architecture}"
            if kernel.stack_bytes:
                yield f"{name}: a stack frame of {kernel.stack_bytes} bytes"
            fit, least = _fitting(kernel, launched[key], device), LEAST_BLOCKS.get(key, {}).get(architecture, 1)
            if fit < least:
                yield f"{name}: {kernel.registers} registers leave room for {fit} blocks, fewer than {least}"
            if architecture == LIMITED and key in CODE_LIMITS:
                assert kernel.code is not None
                limits = zip(("instructions", "MUFU"), _counts(kernel.code), CODE_LIMITS[key], strict=True)
                for what, count, limit in limits:
                    per_element = count / launched[key].elements
                    if per_element > limit:
                        yield f"{name}: {per_element:.1f} {what} per element of a full tile, more than {limit}"


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
        compiled = kernels(tools, arguments.library, (LIMITED,) if arguments.check else COUNTED)
    for architecture, found in compiled.items():
        print(summary(architecture, found))
    if not arguments.check:
        REPORT.write_text(report(compiled, toolkit.version))
    if wrong := sorted(complaints(compiled)):
        sys.exit("kernel report:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
