"""Registers, blocks and instructions of the CUDA kernels as compiled: `make kernel-report`; no GPU is needed.

It writes docs/kernel-report.md, the budgets and the numbers that they bound, and build/kernel-report/kernel.json, all
numbers. It fails if a kernel has a stack frame, which is where registers are spilled to, if fewer of its blocks fit on
a multiprocessor than required, or if it has more code than its limit.

`make kernel-check` fails for the same reasons and writes nothing. Either takes LIBRARY=librwkv_kernels_cuda13.so, whose
machine code is then read instead of compiled again, which is four fifths of the time.
"""

import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_toolkit
import report
import sass

from benchmarks.records import Row
from rwkv_kernels import _introspection

SOURCE = report.ROOT / "csrc" / "cuda" / "kernels.cu"

COMPILERS = 2  # at a time

# The instructions of these are counted; those of the last one also have a limit.
COUNTED = ("8.0", "9.0")
LIMITED = COUNTED[-1]

# A sequence of whole tiles: blocks are the same for every such problem.
PROBLEM = (8, 1024, 768)

# Launches that need no plan: csrc/gpu/tuning.h, csrc/gpu/op.h.
TILE_CHANNELS = 64
REDUCE_THREADS, REDUCE_SHARED_BYTES = 1024, 1024 * 2 * 8
STEP_THREADS = 128
# Of the bidirectional kernels: threads in 16 bits and in float32, and inputs in a tile of 64 steps; `bi_join` has none.
BI_BLOCKS = {
    "bi_sums": (32, 64, 2),
    "bi_forward": (64, 128, 2),
    "bi_adjoint_sums": (64, 128, 3),
    "bi_backward": (128, 128, 3),
}
BI_STEPS, BI_DOUBLE_THREADS, BI_JOIN_THREADS = 64, 32, 128


@dataclass(frozen=True)
class Device:
    """A GPU of each architecture, and the bounds of the blocks on one of its multiprocessors.

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
        """The limits that a plan respects."""
        return {
            "multiprocessors": self.multiprocessors,
            "shared_per_block": self.shared_bytes - self.reserved_bytes,
            "shared_per_multiprocessor": self.shared_bytes,
            "architecture": int(architecture.replace(".", "")) * 10,
        }

    def blocks_that_fit(self, threads: int, registers: int, shared_bytes: int) -> int:
        """The number of one kernel's blocks that fit on a multiprocessor at a time."""
        registers_of_warp = -(-registers * 32 // 256) * 256
        warps = self.registers // registers_of_warp // 4 * 4  # each of four schedulers has a register file
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
    """A compiled kernel, by its name in kernels.def and the dtype that it reads; `code` is that for full tiles."""

    name: str
    dtype: str
    registers: int
    stack_bytes: int
    code: sass.Code | None


@dataclass(frozen=True)
class Block:
    """A kernel's launch by the operators, and the elements of a full tile that one thread has, if it has tiles."""

    threads: int
    shared_bytes: int
    elements: int = 0


OPERATIONS = ("forward", "backward", "mixing_forward", "mixing_backward", "summary", "adjoint_summary")
# By their types.
NAMES = {name.title().replace("_", ""): name for name in (*OPERATIONS, "reduce", "step", *BI_BLOCKS, "bi_join")}
DTYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_8Bfloat16E": "bfloat16", "d": "float64"}
MANGLED = re.compile(rf"wkv_kernelINS_\d+({'|'.join(NAMES)})I({'|'.join(DTYPES)})EE")

# Instructions and MUFU, which compute exponentials and quotients, of the code for a full tile on 9.0, for each of a
# thread's elements: the code around the recurrence must stay small.
CODE_LIMITS = {
    ("forward", "bfloat16"): (29, 2.3),
    ("forward", "float32"): (28, 2.3),
    ("backward", "bfloat16"): (68, 2.5),
    ("backward", "float32"): (65, 2.5),
    ("mixing_forward", "bfloat16"): (40, 3.3),
    ("mixing_forward", "float32"): (39, 3.3),
    ("mixing_backward", "bfloat16"): (87, 3.5),
    ("mixing_backward", "float32"): (84, 3.5),
    ("summary", "bfloat16"): (17, 1.2),
    ("summary", "float32"): (17, 1.2),
    ("adjoint_summary", "bfloat16"): (57, 3.5),
    ("adjoint_summary", "float32"): (55, 3.5),
    # Of code with a gate.
    ("bi_sums", "bfloat16"): (15, 1.2),
    ("bi_sums", "float32"): (18, 1.3),
    ("bi_forward", "bfloat16"): (38, 3.3),
    ("bi_forward", "float32"): (46, 3.3),
    ("bi_adjoint_sums", "bfloat16"): (48, 3.3),
    ("bi_adjoint_sums", "float32"): (57, 3.4),
    ("bi_backward", "bfloat16"): (91, 3.6),
    ("bi_backward", "float32"): (90, 3.6),
}

# Blocks of a kernel that must fit on a multiprocessor: one works while another waits. Shared memory or registers allow
# no more in most places; a T4 has 64 KB and 1024 threads.
_FORWARD = dict.fromkeys(DEVICES, 2)
_BACKWARD_16_BITS = {**dict.fromkeys(DEVICES, 3), "7.5": 2}
# r is one more tile.
_MIXING_BACKWARD_16_BITS = {**dict.fromkeys(DEVICES, 3), "7.5": 1, "8.6": 2, "8.9": 2, "12.0": 2}
_BI = {**dict.fromkeys(DEVICES, 2), "7.5": 1}
_BI_16_BITS = {**dict.fromkeys(DEVICES, 4), "7.5": 3}
_BI_ADJOINTS_16_BITS = {**dict.fromkeys(DEVICES, 4), "7.5": 2, "8.6": 3, "8.9": 3, "12.0": 3}
LEAST_BLOCKS = {
    ("forward", "float32"): _FORWARD,
    ("forward", "float16"): _FORWARD,
    ("forward", "bfloat16"): _FORWARD,
    ("backward", "float32"): {"7.5": 1, "8.0": 2, "8.6": 2, "8.9": 2, "9.0": 3, "10.0": 2, "12.0": 2},
    ("backward", "float16"): _BACKWARD_16_BITS,
    ("backward", "bfloat16"): _BACKWARD_16_BITS,
    ("mixing_forward", "float32"): _FORWARD,
    ("mixing_forward", "float16"): _FORWARD,
    ("mixing_forward", "bfloat16"): _FORWARD,
    ("mixing_backward", "float32"): {"7.5": 1, "8.0": 2, "8.6": 2, "8.9": 2, "9.0": 3, "10.0": 2, "12.0": 2},
    ("mixing_backward", "float16"): _MIXING_BACKWARD_16_BITS,
    ("mixing_backward", "bfloat16"): _MIXING_BACKWARD_16_BITS,
    ("bi_forward", "float32"): _BI,
    ("bi_adjoint_sums", "float32"): {**_BI, "8.6": 1, "8.9": 1, "12.0": 1},
    **dict.fromkeys((("bi_forward", "float16"), ("bi_forward", "bfloat16")), _BI_16_BITS),
    **dict.fromkeys((("bi_adjoint_sums", "float16"), ("bi_adjoint_sums", "bfloat16")), _BI_ADJOINTS_16_BITS),
}
# The same tiles without their outputs.
for _dtype in ("float32", "float16", "bfloat16"):
    LEAST_BLOCKS["summary", _dtype] = _FORWARD
    LEAST_BLOCKS["adjoint_summary", _dtype] = LEAST_BLOCKS["mixing_backward", _dtype]


def identity(mangled: str) -> tuple[str, str]:
    """Name and dtype of a kernel."""
    match = MANGLED.search(mangled)
    if match is None:
        sys.exit(f"kernel report: which kernel is {mangled}?")
    return NAMES[match[1]], DTYPES[match[2]]


# ---- machine code: compiled here, or out of a library ----


def compiled_cubin(nvcc: Path, folder: Path, architecture: str, *macros: str) -> Path:
    """The kernels of one architecture, compiled as the library compiles them."""
    cubin = folder / f"{architecture}{''.join(macros)}.cubin"
    flags = [f for f in cuda_toolkit.nvcc_flags([architecture]) if not f.startswith("-gencode")]
    target = f"-arch=sm_{architecture.replace('.', '')}"
    sass.output(nvcc, *flags, *macros, target, "-cubin", SOURCE, "-o", cubin)
    return cubin


def extracted_cubins(library: Path, folder: Path) -> dict[str, Path]:
    """The kernels of every architecture that a library has been built for."""
    sass.output(sass.program("cuobjdump"), "-xelf", "all", library.resolve(), cwd=folder)
    found = {}
    # nvcc's linker leaves a second, small one without kernels for each architecture.
    for path in sorted(folder.glob("*.sm_*.cubin"), key=lambda path: path.stat().st_size):
        number = path.suffixes[-2].removeprefix(".sm_")
        found[f"{number[:-1]}.{number[-1]}"] = path
    if missing := DEVICES.keys() - found.keys():
        sys.exit(f"kernel report: {library} has no code for {', '.join(sorted(missing))}")
    return found


def kernels(nvcc: Path, library: Path | None, counted: tuple[str, ...]) -> dict[str, list[Kernel]]:
    """Every kernel, by architecture, for some of them with the code for full tiles whose keys share an exponent."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(COMPILERS) as pool:
        folder = Path(name)
        full = {name: pool.submit(compiled_cubin, nvcc, folder, name, "-DWKV_FULL_TILES_ONLY") for name in counted}
        whole = {name: pool.submit(compiled_cubin, nvcc, folder, name) for name in DEVICES if library is None}
        cubins = extracted_cubins(library, folder) if library else {name: made.result() for name, made in whole.items()}
        codes = {
            (name, *identity(mangled)): code
            for name, made in full.items()
            for mangled, code in sass.kernels(sass.listing(made.result()))
        }
        resources = {name: {identity(k): used for k, used in sass.resources(cubins[name]).items()} for name in DEVICES}
    order = [(name, dtype) for name in NAMES.values() for dtype in DTYPES.values()]
    return {
        name: [Kernel(*key, *used[key], codes.get((name, *key))) for key in sorted(used, key=order.index)]
        for name, used in resources.items()
    }


# ---- the report ----


def blocks(architecture: str) -> dict[tuple[str, str], Block]:
    """The blocks that the operators launch on a device, by kernel and dtype."""
    found = {}
    for dtype in DTYPES.values():
        for operation in OPERATIONS:
            plan = _introspection.plan_cuda(operation, dtype, *PROBLEM, DEVICES[architecture].limits(architecture))
            elements = plan["tile_steps"] * TILE_CHANNELS // plan["threads"]
            found[operation, dtype] = Block(plan["threads"], plan["shared_bytes"], elements)
        found["step", dtype] = Block(STEP_THREADS, 0)
    for name, (of_16_bits, of_32_bits, inputs) in BI_BLOCKS.items():
        for dtype, bytes_of in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
            threads = of_32_bits if dtype == "float32" else of_16_bits
            tile = BI_STEPS * TILE_CHANNELS
            # Sums of the warps, the channels' parameters, the ticket and the place.
            shared = inputs * tile * bytes_of + (6 * (threads // 32) + 3) * 4 * TILE_CHANNELS + 16 + 48
            found[name, dtype] = Block(threads, shared, tile // threads)
        found[name, "float64"] = Block(BI_DOUBLE_THREADS, 0)
    found["bi_join", "float32"] = Block(BI_JOIN_THREADS, 0)
    for dtype in ("float32", "float64"):  # of the partials, which have the states' dtype
        found["reduce", dtype] = Block(REDUCE_THREADS, REDUCE_SHARED_BYTES)
    return found


def rows(compiled: dict[str, list[Kernel]]) -> Iterator[Row]:
    """A row of all numbers for each kernel."""
    for architecture, found in compiled.items():
        launched, device = blocks(architecture), DEVICES[architecture]
        for kernel in found:
            block = launched[kernel.name, kernel.dtype]
            row: Row = {
                "architecture": architecture,
                "kernel": kernel.name,
                "dtype": kernel.dtype,
                "registers": kernel.registers,
                "stack bytes": kernel.stack_bytes,
                "shared bytes": block.shared_bytes,
                "threads": block.threads,
                "blocks": _fitting(kernel, block, device),
            }
            if kernel.code is not None:
                row["instructions"], row["MUFU"] = _counts(kernel.code)
                row["elements"] = block.elements
                row["accesses"] = {f"{a.instruction}.{8 * a.width}": n for a, n in sorted(kernel.code.accesses.items())}
            yield row


SHORT = """# The CUDA kernels as compiled

`make kernel-report`, nvcc {version}; `make kernel-check` fails where a limit is exceeded. No kernel may have a stack
frame, where spilled registers would be. Threads, shared memory, memory accesses and the other
dtypes are in build/kernel-report/kernel.json."""
REGISTERS = """Registers of a thread / blocks that fit on a multiprocessor, as launched for B, T, C = {problem} /
the least number of them that is allowed, 1 where there is none."""
CODE = """Instructions / MUFU for each of a thread's elements, in the kernels compiled for full tiles whose keys share
an exponent: all of the code, a block's beginning and end and one turn of each loop included."""


# Those of the tables; docs/triton-report.md takes float16 from here, too.
SHOWN = {*itertools.product(NAMES.values(), ("float32", "bfloat16")), ("forward", "float16"), ("backward", "float16")}


def short_report(rows: list[Row], version: str) -> list[str]:
    """The paragraphs of docs/kernel-report.md."""
    rows = [row for row in rows if (row["kernel"], row["dtype"]) in SHOWN]

    def registers(row: Row) -> str:
        least = LEAST_BLOCKS.get((row["kernel"], row["dtype"]), {}).get(row["architecture"])
        return f"{row['registers']} / {row['blocks']}{f' / {least}' if least else ''}"

    def per_element(row: Row) -> str:
        return " / ".join(f"{row[count] / row['elements']:.1f}" for count in ("instructions", "MUFU"))

    keys = ("kernel", "dtype")
    named = [{**row, "gpu": f"{row['architecture']}, {DEVICES[row['architecture']].name}"} for row in rows]
    counts = report.pivot((row for row in rows if row.get("elements")), keys, "architecture", per_element)
    for row in counts:
        limits = CODE_LIMITS.get((row["kernel"], row["dtype"]))
        row[f"limit for {LIMITED}"] = f"{limits[0]} / {limits[1]}" if limits else "-"
    return [
        SHORT.format(version=version),
        report.table("Registers and blocks", report.pivot(named, keys, "gpu", registers)),
        REGISTERS.format(problem=", ".join(map(str, PROBLEM))),
        report.table("Instructions", counts),
        CODE,
    ]


def _fitting(kernel: Kernel, block: Block, device: Device) -> int:
    return device.blocks_that_fit(block.threads, kernel.registers, block.shared_bytes)


def _counts(code: sass.Code) -> tuple[int, int]:
    return code.instructions, code.mufu


def complaints(compiled: dict[str, list[Kernel]]) -> Iterator[str]:
    """Kernels that keep values in local memory, leave room for too few blocks, have too much code, or are missing."""
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


def main() -> None:
    """Compiles or reads, complains, and writes the report unless only a check is requested."""
    parser = report.parser(__doc__)
    parser.add_argument("--library", type=Path, help="read its machine code instead of compiling")
    arguments = parser.parse_args()
    toolkit = cuda_toolkit.find_toolkit()
    if toolkit is None:
        print("kernel report: nvcc is neither in CUDA_HOME nor on the PATH, so there is nothing to report")
        return
    compiled = kernels(toolkit.nvcc, arguments.library, (LIMITED,) if arguments.check else COUNTED)
    found = list(rows(compiled))
    report.summarise(found, "architecture", "stack bytes")
    if not arguments.check:
        report.write("kernel", found, short_report(found, toolkit.version))
    report.fail_for(complaints(compiled))


if __name__ == "__main__":
    main()
