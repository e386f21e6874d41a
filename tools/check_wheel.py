"""Checks a wheel before it is published: `make wheel` runs it, and so does the workflow that builds releases.

python tools/check_wheel.py dist/rwkv_kernels-1.0-py3-none-manylinux_2_28_x86_64.whl --cuda 13

Every file is expected and every expected file is there, the tag is for any Python 3, the size is bounded, and the
libraries need torch's stable ABI of the oldest torch, and nothing else that a machine with that torch might lack.
auditwheel checks their glibc and gives the wheel its tag.
"""

import argparse
import platform
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

try:
    import torch_abi_audit
except ImportError:  # it has no release for Python 3.10
    torch_abi_audit = None

ROOT = Path(__file__).parent.parent
LARGEST = 15_000_000  # bytes
OLDEST_TORCH = (2, 11)
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0", "libdl.so.2"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cuda", metavar="MAJOR", help="the CUDA version of its GPU library; none without it")
    options = parser.parse_args()

    wrong = faults(options.wheel, options.cuda)
    for fault in wrong:
        print(f"{options.wheel.name}: {fault}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"{options.wheel}: {options.wheel.stat().st_size / 1e6:.2f} MB, as expected")


def faults(wheel: Path, cuda: str | None) -> list[str]:
    """The faults of a wheel, a line for each."""
    # The libraries, each with its requirements beside the system's.
    libraries = {"rwkv_kernels/librwkv_kernels.so": {"libtorch_cpu.so"}}
    if cuda is not None:
        libraries[f"rwkv_kernels/librwkv_kernels_cuda{cuda}.so"] = {"libtorch_cpu.so", f"libcudart.so.{cuda}"}

    found = []
    size = wheel.stat().st_size
    if size > LARGEST:
        found.append(f"{size} bytes, at most {LARGEST} are wanted")
    if not re.fullmatch(rf"rwkv_kernels-[\d.]+-py3-none-(manylinux_\d+_\d+_{platform.machine()}\.?)+\.whl", wheel.name):
        found.append(f"its tag is not py3-none-manylinux_..._{platform.machine()}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        expected = {*modules(), *libraries}
        metadata = {name for name in names if re.fullmatch(METADATA, name)}
        found += [f"{name} is not expected" for name in sorted(names - expected - metadata)]
        found += [f"{name} is missing" for name in sorted(expected - names)]
        for name in sorted(libraries.keys() & names):
            found += [f"{name} {fault}" for fault in _faults_of(Path(archive.extract(name, folder)), libraries[name])]
    return found


METADATA = r"rwkv_kernels-[\d.]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|licenses/LICENSE|sboms/.*)"


def modules() -> set[str]:
    """The Python files of the source tree, and py.typed."""
    folder = ROOT / "rwkv_kernels"
    return {str(path.relative_to(ROOT)) for path in [*folder.rglob("*.py"), folder / "py.typed"]}


def _faults_of(library: Path, needed: set[str]) -> list[str]:
    found = []
    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic = next(section for section in elf.iter_sections() if isinstance(section, DynamicSection))
        tags = [(tag.entry.d_tag, tag) for tag in dynamic.iter_tags()]
        asked = {tag.needed for kind, tag in tags if kind == "DT_NEEDED"}
        found += [f"needs {name}" for name in sorted(asked - needed - SYSTEM)]
        found += [f"does not need {name}" for name in sorted(needed - asked)]
        found += [f"searches {tag.runpath}" for kind, tag in tags if kind == "DT_RUNPATH"]
        found += [f"searches {tag.rpath}" for kind, tag in tags if kind == "DT_RPATH"]
        if elf.get_section_by_name(".symtab") is not None:
            found.append("is not stripped")
    if torch_abi_audit is None:
        print(f"{library.name}: torch's stable ABI is not audited, torch-abi-audit is not installed")
        return found
    report = torch_abi_audit.inspect_extension(library)
    torch = report.torch
    if report.error or not torch.uses_torch:
        return [*found, report.error or "uses nothing of torch"]
    found += [f"uses {symbol}, which is not in torch's stable ABI" for symbol in torch.unstable_symbols]
    found += [f"uses {symbol}, which the audit does not know" for symbol in torch.unknown_shim_symbols]
    oldest = tuple(int(number) for number in (torch.min_torch_version or "0.0").split(".")[:2])
    if oldest > OLDEST_TORCH:
        found.append(f"needs torch {torch.min_torch_version}, for {', '.join(torch.version_defining_symbols)}")
    print(f"{library.name}: {torch.stable_shim_count} symbols of torch's stable ABI of {torch.min_torch_version}")
    return found


if __name__ == "__main__":
    main()
