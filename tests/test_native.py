"""The libraries that are loaded, and the reasons for those that cannot be: stand-ins, in a copy of the package."""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PACKAGE, run_python

from rwkv_kernels import native

OPERATORS = "librwkv_kernels.so"
IN_SOURCE_TREE = "run `pip install --no-build-isolation .` in the source tree"

# For a user: with any libraries, the package imports and the reference computes.
PROGRAM = """
import json, os, sys
import torch
CHANGES
import rwkv_kernels
x = torch.zeros(1, 2, 3)
try:
    rwkv_kernels.wkv(torch.zeros(3), torch.zeros(3), x, x)
except rwkv_kernels.BackendUnavailable as error:
    print(error, file=sys.stderr)
rwkv_kernels.wkv(torch.zeros(3), torch.zeros(3), x, x, backend="reference")
build = rwkv_kernels.build_info()
reasons = {info.name: info.reason for info in rwkv_kernels.backends()}
print(json.dumps({**vars(build), "reasons": reasons, "loaded": sorted(torch.ops.loaded_libraries)}))
"""


def _tell(package: Path, changes: str = "") -> dict[str, Any]:
    """The output of a process that imports the package after these changes to torch."""
    told: dict[str, Any] = json.loads(
        run_python(PROGRAM.replace("CHANGES", changes), package.parent, RWKV_KERNELS_BACKEND="auto").splitlines()[-1]
    )
    assert told["reasons"]["cpu"] == told["why_missing"] and told["reasons"]["reference"] is None
    return told


def _why_not_here(package: Path) -> str:
    """The reason that this process gives for a library that is not loaded."""
    found = native._find_operators(package)
    assert found.path is None and found.info == {}
    return str(found.why_missing)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without libraries."""
    copy = tmp_path / "site" / "rwkv_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_why_no_library.txt"))
    return copy


def _built() -> Path:
    if native.operators.path is None:
        pytest.skip(native.operators.why_missing or "")
    return native.operators.path


def _elf(machine: int) -> bytes:
    """A 64-bit library that has only its header."""
    return struct.pack("<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 3, machine, 1, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0)


# ---- the operators ----


def test_the_operators_are_loaded_and_tell_their_build(package: Path) -> None:
    built = shutil.copy(_built(), package)
    told = _tell(package)
    assert told["library"] == str(built) and told["why_missing"] is None and told["loaded"][0] == str(built)
    assert told["cpu_instruction_set"] in told["cpu_instruction_sets"]


def test_a_package_of_links_finds_its_library(package: Path) -> None:
    """As a download of huggingface_hub is one: files are links into a store, which names them by their hash."""
    shutil.copy(_built(), package)
    for number, path in enumerate(sorted(path for path in package.rglob("*") if path.is_file())):
        stored = package.parent.parent / f"{number:064x}"
        path.rename(stored)
        path.symlink_to(stored)
    assert _tell(package)["library"] == str(package / OPERATORS)


def test_an_older_torch_gets_a_reason_and_no_library(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(_built(), package)
    told = _tell(package, "torch.__version__ = '2.10.0'")
    why = told["why_missing"]
    assert why == told["why_cuda_missing"] and told["loaded"] == []
    assert why == "torch 2.10.0 is older than 2.11, the oldest that the libraries load in: pip install -U 'torch>=2.11'"
    loaded = native.Library(package / OPERATORS, None)
    monkeypatch.setattr(native, "_why_taken", lambda path: None)
    monkeypatch.setattr(native, "_load", lambda path, tell: loaded)
    for version, is_old in (("2.9.1+cu128", True), ("1.13.1", True), ("2.11.0a0+git1234567", False), ("3.0.0", False)):
        monkeypatch.setattr(torch, "__version__", version)
        found = native._find_operators(package)
        assert (f"torch {version} is older than 2.11" in str(found.why_missing)) == is_old
        assert (found == loaded) != is_old


def test_a_package_without_the_library_says_what_to_do(package: Path) -> None:
    why = _tell(package)["why_missing"]
    assert why == f"{OPERATORS} is not built: install a wheel for this platform, or {IN_SOURCE_TREE}"


def test_the_reason_for_an_installation_without_libraries_is_reported(package: Path) -> None:
    (package / "_why_no_library.txt").write_text("there was no C++ compiler (c++)\n")
    why = _why_not_here(package)
    assert why.startswith(f"{OPERATORS} is not built: there was no C++ compiler (c++); install a wheel")
    shutil.copy(_built(), package)
    assert _tell(package)["why_missing"] is None


def test_a_source_tree_is_distinguished_from_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, site, other = tmp_path / "tree", tmp_path / "site", tmp_path / "other"
    for folder in (tree, site, other):
        (folder / "rwkv_kernels").mkdir(parents=True)
    (tree / "setup.py").touch()
    (other / "rwkv_kernels" / "librwkv_kernels_cuda13.so").touch()
    monkeypatch.setattr(sys, "path", [str(tree), str(other), str(site)])

    assert IN_SOURCE_TREE in native._what_helps(site / "rwkv_kernels")
    in_place = f"run `python setup.py build_ext --inplace` in {tree}"
    assert native._what_helps(tree / "rwkv_kernels") == in_place

    (site / "rwkv_kernels" / OPERATORS).touch()
    told = native._what_helps(tree / "rwkv_kernels")
    assert f"{tree}, which hides the package that is installed in {site / 'rwkv_kernels'}: start Python in" in told
    assert told.endswith(in_place)


@pytest.mark.skipif(sys.platform != "linux", reason="the names of what this is are Linux's")
@pytest.mark.parametrize(
    ("content", "made_for"),
    [
        (_elf(183), "aarch64"),
        (_elf(62), "x86_64"),
        (_elf(243), "riscv64"),
        (_elf(9999), r"another processor (ELF machine 9999)"),
        (b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01", "macOS"),
        (b"\xca\xfe\xba\xbe\x00\x00\x00\x02", "macOS"),
        (b"MZ\x90\x00", "Windows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_library_of_another_platform_is_not_loaded(content: bytes, made_for: str, package: Path) -> None:
    here = "Linux" if made_for in ("macOS", "Windows") else platform.machine()
    if made_for == here:
        pytest.skip("that is this platform")
    (package / OPERATORS).write_bytes(content)
    why = _why_not_here(package)
    assert why.startswith(f"{OPERATORS} is for {made_for}, and this is {here}: install a wheel for this platform")


def test_a_library_that_was_cut_off_is_not_loaded(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _built().read_bytes()
    monkeypatch.setattr(native, "_why_taken", lambda path: None)  # this process has the whole one
    for size in (len(content) // 2, len(content) - 1):
        (package / OPERATORS).write_bytes(content[:size])
        why = _why_not_here(package)
        assert why.startswith(f"{OPERATORS} is cut off after {size} of {len(content)} bytes: install")


def test_the_loaders_error_is_reported(package: Path) -> None:
    (package / OPERATORS).write_bytes(b"not a library")
    why = _tell(package)["why_missing"]
    assert why.startswith(f"{OPERATORS} does not load ({package / OPERATORS}: ") and "install a wheel" in why
    assert "Could not load this library" not in why


def test_a_foreign_library_is_reported(package: Path) -> None:
    shutil.copy(next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.*")), package / OPERATORS)
    assert "undefined symbol: rwkv_kernels_build_info" in _tell(package)["why_missing"]


# ---- two copies in a process ----

TWO_COPIES = """
import torch, rwkv_kernels, other
from other.compat import torchscript
x = torch.zeros(1, 2, 3)
given = torch.zeros(3), torch.zeros(3), x, x
assert torch.equal(rwkv_kernels.wkv(*given, backend="cpu"), other.wkv(*given, backend=BACKEND))
scripted = torch.jit.script(torchscript.wkv_with_state)
with other.use_backend(BACKEND):
    scripted(*given, other.empty_state(1, 3))
print(other.native.NAMESPACE, hasattr(torch.ops.rwkv_kernels, "wkv"))
print(other.build_info().why_missing)
"""


def _another(package: Path) -> Path:
    """The copy under the name `other`, beside one with the name and the library of this project."""
    built = _built()
    another = package.rename(package.with_name("other"))
    shutil.copytree(another, package)
    shutil.copy(built, package)
    return another


def test_a_second_library_of_the_same_namespace_is_not_loaded(package: Path) -> None:
    another = _another(package)
    shutil.copy(_built(), another)
    used, why = run_python(TWO_COPIES.replace("BACKEND", "'reference'"), package.parent).splitlines()
    assert used == "other False"
    library, first = another / OPERATORS, package / OPERATORS
    assert why.startswith(f"{library} registers torch.ops.rwkv_kernels, and so did {first} in this process: import one")


def test_a_second_package_works_in_a_namespace_of_its_own(package: Path) -> None:
    another = _another(package)
    # A build with another -DWKV_NAMESPACE differs in these two places alone, if the name has the same length.
    content = _built().read_bytes()
    for place in (b"\0%s\0", b'"namespace": "%s"'):
        if place % b"rwkv_kernels" not in content:
            pytest.skip("the compiler has not left the namespace in one piece")
        content = content.replace(place % b"rwkv_kernels", place % b"rwkv_of_mine")
    (another / OPERATORS).write_bytes(content)
    used, why = run_python(TWO_COPIES.replace("BACKEND", "'cpu'"), package.parent).splitlines()
    assert (used, why) == ("rwkv_of_mine False", "None")


# ---- the CUDA kernels ----


@pytest.fixture
def with_operators(package: Path) -> Path:
    """The copy with the operators."""
    shutil.copy(_built(), package)
    return package


WhyNoCuda = Callable[..., str]


@pytest.fixture
def why_no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WhyNoCuda:
    """The reason in a torch of that CUDA, beside libraries of these versions that do not load."""

    def why(cuda: str | None, *majors: int, hip: str | None = None) -> str:
        for major in majors:
            (tmp_path / f"librwkv_kernels_cuda{major}.so").write_bytes(b"not a library")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        found = native._find_cuda(tmp_path, native.Library(tmp_path / OPERATORS, None))
        assert found.path is None and found.info == {}
        return str(found.why_missing)

    return why


def test_a_torch_without_cuda_is_reported(why_no_cuda: WhyNoCuda) -> None:
    told = "this torch is built without CUDA: install one that is built with CUDA"
    assert why_no_cuda(None) == told
    assert why_no_cuda(None, 13) == f"{told} 13"
    assert why_no_cuda(None, 13, hip="7.0").startswith("this torch is built for ROCm 7.0, without CUDA")


def test_what_is_said_of_cuda_reaches_the_user(with_operators: Path) -> None:
    (with_operators / "librwkv_kernels_cuda13.so").write_bytes(b"not a library")
    told = _tell(with_operators, "torch.version.cuda, torch.version.hip = '12.8', None")
    assert told["why_missing"] is None and told["cuda_library"] is None and told["cuda"] is None
    assert told["reasons"]["cuda"] == told["why_cuda_missing"]
    assert told["why_cuda_missing"].startswith("torch is built with CUDA 12.8, and the CUDA kernels")


def test_a_package_without_cuda_kernels_is_reported(why_no_cuda: WhyNoCuda) -> None:
    assert "this package has no CUDA kernels (build_info().cuda is None): rebuild" in why_no_cuda("13.0")


def test_cuda_kernels_of_another_major_version_are_not_loaded(why_no_cuda: WhyNoCuda) -> None:
    kernels = "and the CUDA kernels of this package are for"
    assert why_no_cuda("12.8", 13).startswith(f"torch is built with CUDA 12.8, {kernels} CUDA 13: install")
    assert why_no_cuda("14.1", 12, 13).startswith(
        f"torch is built with CUDA 14.1, {kernels} CUDA 12 or CUDA 13: install"
    )


@pytest.mark.parametrize("major", [12, 13])
def test_cuda_kernels_of_the_version_of_torch_are_taken(
    major: int, with_operators: Path, why_no_cuda: WhyNoCuda, tmp_path: Path
) -> None:
    name = f"librwkv_kernels_cuda{major}.so"
    assert why_no_cuda(f"{major}.2", 12, 13).startswith(f"{name} does not load ({tmp_path / name}: ")

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source = with_operators.parent / "cuda.cpp"
    build = json.dumps({"namespace": "rwkv_kernels", "cuda": f"{major}.0", "cuda_architectures": ["9.0", "12.0+PTX"]})
    source.write_text(f'extern "C" const char* rwkv_kernels_cuda_build_info() {{ return R"({build})"; }}')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", with_operators / name], check=True)
    told = _tell(with_operators, f"torch.version.cuda = '{major}.2'")
    assert told["cuda_library"] == str(with_operators / name) and told["why_cuda_missing"] is None
    assert told["cuda"] == f"{major}.0" and told["cuda_architectures"] == ["9.0", "12.0+PTX"]


def test_no_cuda_kernels_are_loaded_without_the_operators(package: Path) -> None:
    (package / "librwkv_kernels_cuda13.so").write_bytes(b"not a library")
    told = _tell(package, "torch.version.cuda = '13.0'")
    assert told["why_missing"] == told["why_cuda_missing"] and told["loaded"] == []


# ---- the doctor ----


def test_the_doctor_finds_a_package_without_operators_unwell(package: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rwkv_kernels"], cwd=package.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert f"\nlibrary       missing: {OPERATORS} is not built: install" in result.stdout
    assert "reference   available: off the float64 oracle by" in result.stdout
