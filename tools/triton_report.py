"""The Triton kernels as compiled, for GPUs that need not be here: `make kernel-report` writes docs/triton-report.md.

Registers, spills and shared memory for every target; for NVIDIA's the instructions for each element; and how many
variants of a kernel a sweep of shapes requires. build/kernel-report/triton.json has all numbers. It fails if a kernel
spills registers or has a stack frame.

`make kernel-check` fails for the same reasons, of the kernels with neither and with both, counts no instructions and
writes nothing.
"""

import itertools
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
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

from rwkv_kernels._backends.triton import bidirectional, kernels, op
from rwkv_kernels._backends.triton.op import Launch
from rwkv_kernels._backends.triton.plan import (
    CHECKPOINT_INTERVAL,
    LOADED_STEPS,
    REPLAYED_STEPS,
    Plan,
    make_plan,
    widths,
)
from rwkv_kernels.inputs import BiInputs, Inputs

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
TYPES |= {torch.int32: "i32", torch.int64: "i64"}
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# B and T from one to many, C odd, a multiple of 16, and more: 50 shapes.
SWEEP = [(B, T, C) for B in (1, 8) for T in (1, 63, 64, 300, 2000) for C in (5, 80, 768, 1001, 1536)]


# ---- launches, compiled ----


def launches_of(
    plan: Plan, dtype: torch.dtype, B: int, T: int, C: int, gated: bool = False, sequences: int = 0
) -> list[Launch]:
    """Every kernel as a call of this size would launch it, forward, backward and, unless gated or packed, one step."""
    w, state = torch.empty(C), torch.empty(sequences or B, 3, C)
    k = torch.empty(B, T, C, dtype=dtype)
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32) if sequences else None
    inputs = Inputs(w, w, k, k, state, k if gated else None, cu_seqlens)
    (_, _, checkpoints), forward = op.forward(plan, inputs, True)
    _, backward = op.backward(plan, inputs, checkpoints, k, state)
    step = [] if gated or sequences else op.step(w, w, k[:, 0], k[:, 0], state, k[:, 0])[1]
    return forward + backward + step


def summary_launches_of(plan: Plan, dtype: torch.dtype, B: int, T: int, C: int, gated: bool = False) -> list[Launch]:
    """The same of the summaries, forward and backward."""
    w, state = torch.empty(C), torch.empty(B, 3, C)
    k = torch.empty(B, T, C, dtype=dtype)
    inputs = Inputs(w, w, k, k, state, k if gated else None)
    checkpoints = torch.empty(inputs.checkpoint_shape(CHECKPOINT_INTERVAL))
    return op.summary(plan, w, k, k)[1] + op.adjoint_summary(plan, inputs, checkpoints, k)[1]


def bi_launches_of(
    channels: int, dtype: torch.dtype, T: int, C: int, gated: bool = False, sequences: int = 0
) -> list[Launch]:
    """The same of the bidirectional operator."""
    parameter, k = torch.empty(C), torch.empty(1, T, C, dtype=dtype)
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32) if sequences else None
    inputs = BiInputs(parameter, parameter, k, k, k if gated else None, cu_seqlens)
    _, forward = op.bi_forward(channels, inputs)
    _, backward = op.bi_backward(channels, inputs, k)
    return [launch for launch in forward + backward if launch.kernel in bidirectional.__all__]


# Names of the forms that a kernel is compiled in, and whether there are r and cu_seqlens.
FORMS = {"plain": (False, False), "gated": (True, False), "packed": (False, True), "gated, packed": (True, True)}
EXTREMES = ("plain", "gated, packed")


def forms_of(
    dtype: torch.dtype, channels: int, forms: Iterable[str], with_bi: bool = False
) -> list[tuple[str, Launch]]:
    """A launch of every kernel in these forms, with the name of the form, for a program of so many channels.

    A kernel that does not know about one of the two has the form without it; `step` is gated in its only one. Those of
    summaries are forms of their own.
    """
    found: dict[tuple[str, str], Launch] = {}
    for gated, packed in map(FORMS.__getitem__, forms):
        sequences = 3 if packed else 0
        plan = Plan(channels, 64, 3 + sequences)
        launches = launches_of(plan, dtype, 1, 192, 2 * channels, gated, sequences)
        if with_bi:
            launches += bi_launches_of(channels, dtype, 192, 2 * channels, gated, sequences)
        for launch in launches:
            parameters = op.kernel_of(launch).arg_names
            form = (gated and "r" in parameters, packed and "cu_seqlens" in parameters)
            name = next(name for name, which in FORMS.items() if which == form)
            found.setdefault((launch.kernel, name), launch)
        for launch in summary_launches_of(Plan(channels, 64, 3), dtype, 1, 192, 2 * channels, gated):
            is_gated = gated and "r" in op.kernel_of(launch).arg_names
            found.setdefault((launch.kernel, "gated, summary" if is_gated else "summary"), launch)
    return [(name, launch) for (_, name), launch in found.items()]


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """A launch's kernel as Triton compiles it when the launch is the first of its kind."""
    kernel = op.kernel_of(launch)
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
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=target, options=launch.options(target.backend))


# ---- their resources ----


@dataclass(frozen=True)
class Row:
    """One form of a kernel for one dtype, width and GPU; instructions are None where no loop over steps was counted."""

    kernel: str
    form: str
    dtype: str
    channels: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: float | None
    mufu: float | None


# The steps of the loops that every element passes, from the shorter loop to the longer one.
LOOPS = {
    "summarise_states": (LOADED_STEPS,),
    "forward": (LOADED_STEPS,),
    "summarise_adjoints": (LOADED_STEPS,),
    "backward": (LOADED_STEPS, REPLAYED_STEPS),
}


def _per_element(kernel: str, form: str, listing: str, channels_of_thread: int) -> tuple[float, float]:
    """Instructions and MUFU for each element and step, summed over the loops that an element passes."""
    expected = LOOPS[kernel]
    if kernel == "summarise_adjoints" and "gated" in form:
        expected = (REPLAYED_STEPS // 2 if "summary" in form else REPLAYED_STEPS,)
    instructions = mufu = 0.0
    # The loops over the remaining single steps are shorter.
    loops = sorted(sass.innermost_loops(listing), key=lambda loop: loop.instructions)
    for steps, loop in zip(expected, loops[-len(expected) :], strict=True):
        elements = steps * channels_of_thread
        instructions += loop.instructions / elements
        mufu += loop.mufu / elements
    return instructions, mufu


def rows(target: str, dtypes: Iterable[torch.dtype], counted: bool = True, forms: Iterable[str] = FORMS) -> list[Row]:
    """Compiles every kernel for a target, every dtype, width and form; instructions are counted on request."""
    return [
        _row(launch, form, TARGETS[target], dtype, channels, counted)
        for dtype in dtypes
        for channels in sorted(set(widths(TARGETS[target].warp_size)))
        for form, launch in forms_of(dtype, channels, forms, with_bi=channels == widths(TARGETS[target].warp_size)[0])
    ]


def _row(launch: Launch, form: str, target: GPUTarget, dtype: torch.dtype, channels: int, counted: bool) -> Row:
    compiled = compile_launch(launch, target)
    instructions = mufu = None
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            ((registers, spilled),) = sass.resources(Path(file.name)).values()
            if counted and launch.kernel in LOOPS:
                listing = sass.listing(Path(file.name))
                instructions, mufu = _per_element(launch.kernel, form, listing, channels // target.warp_size)
    else:
        names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
        facts = {name: int(n) for name, n in re.findall(rf"\.({names}):\s+(\d+)", compiled.asm["amdgcn"])}
        registers = facts["vgpr_count"]
        # Scalar registers are spilled into vector ones, which takes no memory.
        spilled = 4 * (facts["vgpr_spill_count"] + facts["sgpr_spill_count"])
        spilled = max(spilled, facts["private_segment_fixed_size"])
    shared = int(compiled.metadata.shared)
    return Row(launch.kernel, form, DTYPES[dtype], channels, registers, spilled, shared, instructions, mufu)


def all_rows(counted: bool) -> list[dict[str, Any]]:
    """The rows of every target and dtype, by several processes; uncounted, of the least and the largest form."""
    forms = tuple(FORMS) if counted else EXTREMES
    targets, dtypes = zip(*itertools.product(TARGETS, [[dtype] for dtype in DTYPES]), strict=True)
    with ProcessPoolExecutor(COMPILERS) as pool:
        parts = list(pool.map(rows, targets, dtypes, itertools.repeat(counted), itertools.repeat(forms)))
    return [{"target": name, **asdict(row)} for name, part in zip(targets, parts, strict=True) for row in part]


# ---- variants ----


def variants(launches: Iterable[Launch]) -> dict[str, int]:
    """The number of variants of each kernel that Triton compiles for these launches, by the keys of its cache."""
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

HEAD = f"""# The Triton kernels as compiled

`make kernel-report`, Triton {triton.__version__}; `make kernel-check` fails where a kernel spills registers.
build/kernel-report/triton.json has every form, dtype and width, and shared memory."""
COUNTS = f"""Instructions / MUFU, the unit of exponentials and roots, for each element, {COMPARED}: in the loops over
groups of steps, by the channels of a program. Packed sequences have the same loops. Those of CUDA, from
[kernel-report.md](kernel-report.md), are of kernels that sum up chunks and run through them at once."""
REGISTERS = """Registers of a thread with 64 / 128 channels in a program, on AMD with 128: the most of all dtypes.
Kernels that have no row of a form have no code for it; a summary takes these over all chunks."""
VARIANTS = f"""Compiled over {len(SWEEP)} shapes of B, T and C on an H100, in bfloat16, with gradients: at most one for
each of the two widths, where C is a multiple of 16 and where it is not."""


def _cuda_counts() -> dict[tuple[str, str], str]:
    """The counts of docs/kernel-report.md, which the same make target writes first, by kernel and dtype."""
    lines = (report.ROOT / "docs" / "kernel-report.md").read_text().split("## Instructions\n")[1].splitlines()
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    )
    place = columns.index(f"{COMPARED[3:-1]}.{COMPARED[-1]}")
    return {(row[0], row[1]): row[place] for row in rows if row[0] in LOOPS}


def short_report(rows: list[dict[str, Any]]) -> list[str]:
    """The paragraphs of docs/triton-report.md."""
    counted = [
        {**row, "width": f"{row['channels']} channels"}
        for kernel in LOOPS
        for row in rows
        if (row["target"], row["kernel"]) == (COMPARED, kernel) and row["form"] in ("plain", "gated")
    ]
    counts = report.pivot(
        counted, ("kernel", "form", "dtype"), "width", lambda row: f"{row['instructions']:.1f} / {row['mufu']:.1f}"
    )
    cuda = _cuda_counts()
    for row in counts:
        row["CUDA"] = cuda.get((row["kernel"], row["dtype"]), "-") if row["form"] == "plain" else "-"

    def most(row: dict[str, Any]) -> str:
        same = [x for x in rows if all(x[key] == row[key] for key in ("target", "kernel", "form"))]
        channels = sorted({x["channels"] for x in same})
        return " / ".join(str(max(x["registers"] for x in same if x["channels"] == width)) for width in channels)

    return [
        HEAD,
        report.table("Beside the CUDA kernels", counts),
        COUNTS,
        report.table("Registers", report.pivot(rows, ("kernel", "form"), "target", most)),
        REGISTERS,
        report.table("Variants", [variants(launches_of_sweep())]),
        VARIANTS,
    ]


def main() -> None:
    """Compiles, complains, and writes the report unless only a check is requested."""
    arguments = report.parser(__doc__).parse_args()
    found = all_rows(counted=not arguments.check)
    report.summarise(found, "target", "spilled_bytes")
    if not arguments.check:
        report.write("triton", found, short_report(found))
    report.fail_for(f"a Triton kernel spills registers: {row}" for row in found if row["spilled_bytes"])


if __name__ == "__main__":
    main()
