"""Counts the instructions of the CPU kernels' loops, as a table: needs g++, aarch64-linux-gnu-g++ and llvm-mca-14.

A row is a loop of wkv's kernels without a gate: its instructions for a vector of one step, and the cycles that llvm-mca
estimates for it on a processor of the kind, if everything is in the first cache and nothing else runs beside it.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fwrapv"]
SOURCE = """
#define WKV_ISA report
#define WKV_SIMD_BYTES {bytes}
#include "csrc/cpu/kernel.h"
using K = wkv::cpu::report::Kernel<wkv::DType::{dtype}>;
template void K::forward<true, K::Ungated>(const wkv::cpu::ForwardParams&, const wkv::cpu::WorkItem&);
template void K::backward<true, K::Ungated>(const wkv::cpu::BackwardParams&, const wkv::cpu::WorkItem&);
"""


@dataclass(frozen=True)
class Target:
    """How to compile for an instruction set, whose processor stands for it, and what tells its loops apart."""

    compiler: str
    bytes: int
    flags: tuple[str, ...]
    mca: tuple[str, ...]
    divide: str = r"vdiv"
    least: str = r"vmin"
    most: str = r"vmax"
    product: str = r"vf\w*m(add|sub)"
    prefetch: str = r"prefetch"


ZEN = ("-mtriple=x86_64", "-mcpu=znver3")
TARGETS = {
    "AVX2": Target("g++", 32, ("-mavx2", "-mfma", "-mf16c"), ZEN),
    "AVX-512": Target(
        "g++", 64, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        ("-mtriple=x86_64", "-mcpu=icelake-server"),
    ),
    "NEON": Target(
        "aarch64-linux-gnu-g++", 16, (), ("-mtriple=aarch64", "-mcpu=neoverse-n1"),
        r"fdiv", r"fcmgt|fcmlt|fmin", r"fcmgt|fcmlt|fmax", r"fml[as]", r"prfm",
    ),
}  # fmt: skip


def functions(target: Target, dtype: str) -> dict[str, list[str]]:
    """The assembly of the two kernels, without comments and directives."""
    source = SOURCE.format(bytes=target.bytes, dtype=dtype)
    command = [target.compiler, *FLAGS, *target.flags, "-I.", "-xc++", "-", "-S", "-o-", "-w"]
    text = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for name, mangled in (("forward", "7forwardILb1E"), ("backward", "8backwardILb1E")):
        (body,) = re.findall(rf"^\w+{mangled}\w*:\n(.*?)\.cfi_endproc", text, re.DOTALL | re.MULTILINE)
        lines = (re.split(r"\s*(?:#|//)", line)[0].strip() for line in body.splitlines())
        found[name] = [line for line in lines if line and (not line.startswith(".") or line.endswith(":"))]
    return found


def innermost_loops(lines: list[str]) -> list[list[str]]:
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    jumps = ((i, re.search(r"^(?:j|b|cb|tb)\S*\s.*?(\.L\w+)$", line)) for i, line in enumerate(lines))
    spans = [(places[jump[1]], i) for i, jump in jumps if jump is not None and places.get(jump[1], i) < i]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[line for line in lines[begin : end + 1] if not line.endswith(":")] for begin, end in inner]


def count(pattern: str, loop: list[str]) -> int:
    return sum(re.match(pattern, line) is not None for line in loop)


def kind_of(loop: list[str], target: Target, function: str) -> tuple[str, int] | None:
    """The part of the kernel that a loop is, and the number of vectors that it takes at once."""
    divisions, products = count(target.divide, loop), count(target.product, loop)
    prefetches = count(target.prefetch, loop)
    if divisions and prefetches:
        return ("y and the sums", divisions) if function == "forward" else ("adjoints", divisions // 2)
    if products >= 5 and count(target.most, loop):
        return ("exponentials" if function == "forward" else "exponentials and sums", count(target.most, loop))
    if not products and count(target.least, loop) and count(target.most, loop):
        vectors = count(target.least, loop)
        return ("range of the keys", vectors) if not count(r"vadd|fadd", loop) else None
    return None


def cycles(loop: list[str], target: Target) -> float:
    text = "\n".join(re.sub(r"\.L\w+$", "end", line) for line in loop) + "\nend:\n"
    command = ["llvm-mca-14", *target.mca, "-iterations=100", "-"]
    report = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    (total,) = re.findall(r"Total Cycles: +(\d+)", report)
    return int(total) / 100


def main() -> None:
    print("| | dtype | | loop | instructions | cycles |\n| --- | --- | --- | --- | --- | --- |")
    for name, target in TARGETS.items():
        for dtype in ("float32", "bfloat16"):
            for function, lines in functions(target, dtype).items():
                best: dict[str, tuple[float, float]] = {}
                for loop in innermost_loops(lines):
                    kind = kind_of(loop, target, function)
                    if kind is None:
                        continue
                    what, vectors = kind
                    found = (len(loop) / vectors, cycles(loop, target) / vectors)
                    best[what] = min(found, best.get(what, found))
                for what, (instructions, time) in best.items():
                    print(f"| {name} | {dtype} | {function} | {what} | {instructions:.1f} | {time:.1f} |")


if __name__ == "__main__":
    sys.exit(main())
