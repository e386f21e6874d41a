"""The CUDA toolkit, its flags and the GPUs to compile for: for setup.py, CMakeLists.txt and the kernel report."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# From Turing on, one for every generation that torch still supports; PTX of the last serves newer ones.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

NO_TOOLKIT = "there is no CUDA toolkit: nvcc is neither in CUDA_HOME nor on the PATH"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: `home` has include/ and lib64/, `version` is such as "13.0"."""

    home: Path
    nvcc: Path
    version: str

    def architectures(self) -> list[str]:
        """Compute capabilities to compile for, such as "9.0", or "9.0+PTX" for those that newer GPUs may translate."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if asked:
            items = re.split(r"[\s;,]+", asked.strip(" ;,"))
            matches = [re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", item) for item in items]
            if None in matches:
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers as in '8.0 9.0+PTX', got {asked!r}")
            # The kernels need nothing that only one chip has, so 9.0a means 9.0.
            return [match[1] + (match[2] or "") for match in matches if match]
        known = _output(self.nvcc, "--list-gpu-arch").split()
        *others, last = [item for item in ARCHITECTURES if f"compute_{_digits(item)}" in known]
        return [*others, f"{last}+PTX"]

    def library_flags(self, architectures: list[str]) -> list[str]:
        """nvcc's flags for a library that is shipped: compressed to a sixth, where drivers read that.

        Drivers that run a build of a toolkit before 13 may be too old for it.
        """
        compressed = ["--compress-mode=size"] if int(self.version.split(".")[0]) >= 13 else []
        return [*nvcc_flags(architectures), *compressed]


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, or of the nvcc on the PATH, or the one in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        return None
    home = Path(found).parent.parent
    if not (home / "include" / "cuda_runtime.h").exists():
        # A wrapper script: the compiler itself knows where it is.
        top = re.search(r"#\$ TOP=(.*)", _output(found, "--dryrun", "-x", "cu", os.devnull))
        home = Path(top[1]).resolve() if top else home
    version = re.search(r"release (\d+\.\d+)", _output(found, "--version"))
    return Toolkit(home, Path(found), version[1]) if version else None


def find_program(name: str) -> str | None:
    """A program on the PATH, of the toolkit, or of a separate Nsight Compute."""
    toolkit = find_toolkit()
    folders = [os.environ.get("PATH", ""), *([str(toolkit.home / "bin")] if toolkit else [])]
    folders += map(str, Path("/opt/nvidia/nsight-compute").glob("*"))
    return shutil.which(name, path=os.pathsep.join(folders))


def to_build_with(torch_cuda: str | None) -> Toolkit | None:
    """The toolkit if CUDA kernels are built, else None; `torch_cuda` is the CUDA version of the torch.

    RWKV_KERNELS_CUDA decides: 0 for no; 1 for an error without a toolkit, with any torch, since its headers are the
    same with and without CUDA; unset for what the torch can run.
    """
    wanted = os.environ.get("RWKV_KERNELS_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"RWKV_KERNELS_CUDA: expected 0 or 1, got {wanted!r}")
    toolkit = None if wanted == "0" else find_toolkit()
    if toolkit is None:
        reason = NO_TOOLKIT if wanted != "0" else "RWKV_KERNELS_CUDA=0"
    else:
        reason = None if wanted == "1" else _why_not(toolkit, torch_cuda)
    if wanted == "1" and reason is not None:
        raise SystemExit(f"RWKV_KERNELS_CUDA=1, but {reason}")
    built = f"for {', '.join(toolkit.architectures())}" if reason is None and toolkit else f"none: {reason}"
    print(f"CUDA kernels: {built}", file=sys.stderr)
    return toolkit if reason is None else None


def _why_not(toolkit: Toolkit, torch_cuda: str | None) -> str | None:
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"torch is built with CUDA {torch_cuda}, and the toolkit in {toolkit.home} is {toolkit.version}"
    return None


def nvcc_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for the kernels, in every build; the kernels need nothing of torch."""
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    flags.append("-Xcompiler=-Wall,-Wno-psabi,-Wno-unknown-pragmas,-fvisibility=hidden")
    for architecture in architectures:
        number = _digits(architecture)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def for_cmake(torch_cuda: str | None) -> list[str]:
    """The toolkit's folder and version, the architectures as one word, and nvcc's flags; nothing without CUDA."""
    toolkit = to_build_with(torch_cuda)
    if toolkit is None:
        return []
    architectures = toolkit.architectures()
    return [str(toolkit.home), toolkit.version, ",".join(architectures), *toolkit.library_flags(architectures)]


def _digits(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def _output(*command: str | Path) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.stdout
