"""The Triton kernels as compiled, for GPUs that need not be here: `make kernel-report` writes docs/triton-report.md.

Registers, spills and shared memory for every target; for NVIDIA's the instructions for each element; and how many
variants of a kernel a sweep of shapes asks for. Fails if a kernel spills registers.

`make kernel-check` fails for the same reason, counts no instructions and writes nothing.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import torch

try:
    import triton
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print("kernel report: Triton is not installed (pip install triton), so there is nothing to report of its kernels")
    sys.exit()

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from rwkv_kernels._backends.triton import kernels, op
from rwkv_kernels._backends.triton.op import Launch
from rwkv_kernels._backends.triton.plan import LOADED_STEPS, REPLAYED_STEPS, Plan, make_plan, widths
from rwkv_kernels.inputs import Inputs

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "triton-report.md"
CUDA_REPORT = ROOT / "docs" / "kernel-report.md"

COMPILERS = 2  # at a time

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COMPARED = "sm_90"  # with the CUDA kernels
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# B and T from one to many, C odd, a multiple of 16, and more: 50 shapes.
SWEEP = [(B, T, C) for B in (1, 8) for T in (1, 63, 64, 300, 2000) for C in (5, 80, 768, 1001, 1536)]


# ---- launches, compiled ----


def launches_of(plan: Plan, dtype: torch.dtype, B: int, T: int, C: int) -> list[Launch]:
    """Every kernel as a call of this size would launch it, forward, backward and one step."""
    w, state = torch.empty(C), torch.empty(B, 3, C)
    k = torch.empty(B, T, C, dtype=dtype)
    inputs = Inputs(w, w, k, k, state)
    (_, _, checkpoints), forward = op.forward(plan, inputs, True)
    _, backward = op.backward(plan, inputs, checkpoints, k, state)
    _, step = op.step(w, w, k[:, 0], k[:, 0], state, k[:, 0])
    return forward + backward + step


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """A launch's kernel as Triton compiles it when the launch is the first of its kind."""
    kernel = getattr(kernels, launch.kernel)
    signature, constants = {}, {}
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = parameter.annotation_type
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    return triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)


# ---- what they take ----


@dataclass(frozen=True)
class Row:
    """One kernel for one dtype, width and GPU; instructions are None where no loop over steps was counted."""

    kernel: str
    dtype: str
    channels: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: float | None
    mufu: float | None


def _read_by(tool: str, flag: str, compiled: Any) -> str:
    """The output of one of Triton's own tools about an NVIDIA kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout


# The steps of the loops that every element passes, from the shorter loop to the longer one.
LOOPS = {
    "summarise_states": (LOADED_STEPS,),
    "forward": (LOADED_STEPS,),
    "summarise_adjoints": (LOADED_STEPS,),
    "backward": (LOADED_STEPS, REPLAYED_STEPS),
}


def _per_element(kernel: str, listing: str, channels_of_thread: int) -> tuple[float, float]:
    """Instructions and MUFU for each element and step, summed over the loops that an element passes."""
    expected = LOOPS[kernel]
    instructions = mufu = 0.0
    # The loops over single steps that are left over are shorter.
    loops = sorted(sass.innermost_loops(listing), key=lambda loop: loop.instructions)
    for steps, loop in zip(expected, loops[-len(expected) :], strict=True):
        elements = steps * channels_of_thread
        instructions += loop.instructions / elements
        mufu += loop.mufu / elements
    return instructions, mufu


def rows(target: str, dtypes: Iterable[torch.dtype], counted: bool = True) -> Iterator[Row]:
    """Compiles every kernel for a target, every dtype and width; instructions are counted on request."""
    for dtype in dtypes:
        for channels in sorted(set(widths(TARGETS[target].warp_size))):
            for launch in launches_of(Plan(channels, 64, 3), dtype, 1, 192, 2 * channels):
                yield _row(launch, TARGETS[target], dtype, channels, counted)


def _row(launch: Launch, target: GPUTarget, dtype: torch.dtype, channels: int, counted: bool) -> Row:
    compiled = compile_launch(launch, target)
    instructions = mufu = None
    if target.backend == "cuda":
        usage = _read_by("cuobjdump", "-res-usage", compiled)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        registers, spilled = int(found[1]), int(found[2])
        if counted and launch.kernel in LOOPS:
            listing = _read_by("nvdisasm", "-c", compiled)
            instructions, mufu = _per_element(launch.kernel, listing, channels // target.warp_size)
    else:
        facts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        registers = int(facts["vgpr_count"])
        spilled = 4 * (int(facts["vgpr_spill_count"]) + int(facts["sgpr_spill_count"]))
    shared = int(compiled.metadata.shared)
    return Row(launch.kernel, DTYPES[dtype], channels, registers, spilled, shared, instructions, mufu)


def _rows_of(target: str, dtype: torch.dtype, counted: bool) -> list[Row]:
    return list(rows(target, [dtype], counted))


def all_rows(counted: bool) -> dict[str, list[Row]]:
    """Those of every target and dtype, compiled by several processes."""
    work = list(itertools.product(TARGETS, DTYPES))
    with ProcessPoolExecutor(COMPILERS) as pool:
        found = list(pool.map(_rows_of, *zip(*work, strict=True), itertools.repeat(counted)))
    return {
        name: [row for (target, _), part in zip(work, found, strict=True) if target == name for row in part]
        for name in TARGETS
    }


# ---- variants ----


def variants(launches: Iterable[Launch]) -> dict[str, int]:
    """How many variants of each kernel Triton compiles for these launches, by the keys of its own cache."""
    backend = make_backend(TARGETS[COMPARED])
    binders, keys = {}, {}
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        binders[name] = create_function_from_signature(kernel.signature, kernel.params, backend)
        keys[name] = set[str]()
    for launch in launches:
        _, key, _ = binders[launch.kernel](*launch.arguments, **launch.constants)
        keys[launch.kernel].add(str(key))
    return {name: len(found) for name, found in keys.items()}


def launches_of_sweep() -> Iterator[Launch]:
    """The launches of an H100 for every shape of the sweep, in bfloat16."""
    for B, T, C in SWEEP:
        yield from launches_of(make_plan(B, T, C, multiprocessors=132, warp=32), torch.bfloat16, B, T, C)


# ---- the report ----

COLUMNS = ("kernel", "dtype", "channels", "registers", "spilled", "shared", "instructions / element", "MUFU / element")
PREFACE = f"""# The Triton kernels as compiled

`make kernel-report`, Triton {triton.__version__}. Channels are those of a program; spilled registers and shared memory
are in bytes. Instructions, and MUFU, the unit of exponentials and roots, are counted in machine code, in the loops over
groups of steps, for each element of a group.

## Beside the CUDA kernels

Instructions / MUFU for each element, {COMPARED}; those of CUDA are from [kernel-report.md](kernel-report.md), of
kernels that summarise chunks and compute them in one launch.

"""
VARIANTS = f"""## Variants

What is compiled over {len(SWEEP)} shapes of B, T and C on an H100, in bfloat16, with gradients: at most one for each of
the two widths, where C is a multiple of 16 and where it is not.

"""


def _cuda_counts() -> dict[tuple[str, str], str]:
    """Those of docs/kernel-report.md, which the same verb writes first, by kernel and dtype."""
    architecture = f"{COMPARED[3:-1]}.{COMPARED[-1]}"
    section = CUDA_REPORT.read_text().split(f"## {architecture}\n")[1].split("\n## ")[0]
    pattern = r"^\| (\w+) \| (\w+) \| \d+ \| (\d+\.\d) \| (\d+\.\d) \|"
    return {(name, dtype): f"{a} / {b}" for name, dtype, a, b in re.findall(pattern, section, re.MULTILINE)}


def report(compiled: Mapping[str, Sequence[Row]]) -> str:
    """All tables as Markdown."""
    parts = [PREFACE + _comparison(compiled[COMPARED]), VARIANTS + _table(("kernel", "variants"), _variant_lines())]
    for target, found in compiled.items():
        parts.append(f"## {target}\n\n{_table(COLUMNS, [_line(row) for row in found])}")
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> tuple[object, ...]:
    counts = ("" if x is None else f"{x:.1f}" for x in (row.instructions, row.mufu))
    return (row.kernel, row.dtype, row.channels, row.registers, row.spilled_bytes, row.shared_bytes, *counts)


def _comparison(compiled: Sequence[Row]) -> str:
    counts = {
        (row.kernel, row.dtype, row.channels): f"{row.instructions:.1f} / {row.mufu:.1f}"
        for row in compiled
        if row.kernel in LOOPS
    }
    cuda = _cuda_counts()
    lines = []
    for kernel, dtype in itertools.product(LOOPS, DTYPES.values()):
        ours = (counts[kernel, dtype, channels] for channels in widths(32))
        lines.append((kernel, dtype, *ours, cuda.get((kernel, dtype), "")))
    columns = (f"Triton, {channels} channels" for channels in widths(32))
    return _table(("kernel", "dtype", *columns, "CUDA"), lines)


def _variant_lines() -> list[tuple[str, int]]:
    return list(variants(launches_of_sweep()).items())


def _table(names: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (names, ["---"] * len(names), *lines))


def main() -> None:
    """Compiles, complains, and writes the report unless only a check is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write no report")
    arguments = parser.parse_args()
    compiled = all_rows(counted=not arguments.check)
    for target, found in compiled.items():
        most = max(found, key=lambda row: row.registers)
        spilling = sum(row.spilled_bytes > 0 for row in found)
        print(f"{target}: {len(found)} kernels, {most.registers} registers at most, {spilling or 'none'} with spills")
    if not arguments.check:
        REPORT.write_text(report(compiled))
    spills = [f"{target}: {row}" for target, found in compiled.items() for row in found if row.spilled_bytes]
    if spills:
        sys.exit("kernel report: these Triton kernels spill registers\n" + "\n".join(spills))


if __name__ == "__main__":
    main()
