"""The build where something is missing, and the refusal of a wheel that is not as it should be.

The wheel itself is built and checked by `make wheel`.
"""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from torch.utils import cpp_extension

pytest.importorskip("elftools", reason="pyelftools, which auditwheel brings, is not installed")
pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed")
import check_wheel

TAG = f"manylinux_2_28_{platform.machine()}"
LIBRARY = "rwkv_kernels/librwkv_kernels.so"
STABLE = 'extern "C" unsigned long aoti_torch_abi_version(); unsigned long f() { return aoti_torch_abi_version(); }'
UNSTABLE = STABLE + "namespace at { int get_num_threads(); } int g() { return at::get_num_threads(); }"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A library like ours as far as the check reads it, and others that each have one fault."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None or platform.system() != "Linux":
        pytest.skip("the libraries of this test need a C++ compiler, on Linux")
    folder = tmp_path_factory.mktemp("libraries")

    def made(text: str, *flags: str) -> bytes:
        (folder / "source.cpp").write_text(text)
        torch = [f"-L{path}" for path in cpp_extension.library_paths()]
        command = [compiler, "-shared", "-fPIC", "source.cpp", "-o", "library.so", *torch, *flags]
        subprocess.run(command, cwd=folder, check=True)
        return (folder / "library.so").read_bytes()

    return {
        "right": made(STABLE, "-s", "-ltorch_cpu"),
        "with symbols": made(STABLE, "-ltorch_cpu"),
        "unstable": made(UNSTABLE, "-s", "-ltorch_cpu"),
        "with another library": made(STABLE, "-s", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"),
        "without torch": made("int f() { return 1; }", "-s"),
        "with a path": made(STABLE, "-s", "-ltorch_cpu", "-Wl,-rpath,/opt/torch/lib"),
    }


def _faults(path: Path, files: dict[str, bytes], cuda: str | None = None) -> list[str]:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return check_wheel.faults(path, cuda)


def _files(library: bytes) -> dict[str, bytes]:
    metadata = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")
    names = [*check_wheel.modules(), *(f"rwkv_kernels-1.0.dist-info/{name}" for name in metadata)]
    return {**dict.fromkeys(names, b""), LIBRARY: library}


def test_a_wheel_as_it_should_be_has_no_faults(tmp_path: Path, libraries: dict[str, bytes]) -> None:
    assert _faults(tmp_path / f"rwkv_kernels-1.0-py3-none-{TAG}.whl", _files(libraries["right"])) == []


@pytest.mark.parametrize(
    ("library", "fault"),
    [
        ("with symbols", "is not stripped"),
        ("unstable", "uses at::get_num_threads(), which is not in torch's stable ABI"),
        ("with another library", "needs libtorch.so"),
        ("without torch", "does not need libtorch_cpu.so"),
        ("with a path", "searches /opt/torch/lib"),
    ],
)
def test_a_library_that_would_not_load_everywhere_is_a_fault(
    library: str, fault: str, tmp_path: Path, libraries: dict[str, bytes]
) -> None:
    found = _faults(tmp_path / f"rwkv_kernels-1.0-py3-none-{TAG}.whl", _files(libraries[library]))
    assert f"{LIBRARY} {fault}" in found


def test_files_that_are_too_many_or_too_few_are_faults(tmp_path: Path, libraries: dict[str, bytes]) -> None:
    files = _files(libraries["right"])
    del files["rwkv_kernels/nn/model.py"]
    files["rwkv_kernels/_introspection.cpython-311-x86_64-linux-gnu.so"] = b""
    assert _faults(tmp_path / f"rwkv_kernels-1.0-py3-none-{TAG}.whl", files, cuda="13") == [
        "rwkv_kernels/_introspection.cpython-311-x86_64-linux-gnu.so is not expected",
        "rwkv_kernels/librwkv_kernels_cuda13.so is missing",
        "rwkv_kernels/nn/model.py is missing",
    ]


@pytest.mark.parametrize(
    "tag", ["cp311-cp311-" + TAG, "py3-none-any", "py3-none-linux_x86_64", "py3-none-manylinux_2_28_vax"]
)
def test_a_tag_that_promises_something_else_is_a_fault(tag: str, tmp_path: Path, libraries: dict[str, bytes]) -> None:
    found = _faults(tmp_path / f"rwkv_kernels-1.0-{tag}.whl", _files(libraries["right"]))
    assert found == [f"its tag is not py3-none-manylinux_..._{platform.machine()}"]


def test_a_large_wheel_is_a_fault(tmp_path: Path, libraries: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_wheel, "LARGEST", 1000)
    (fault,) = _faults(tmp_path / f"rwkv_kernels-1.0-py3-none-{TAG}.whl", _files(libraries["right"]))
    assert fault.endswith("at most 1000 are wanted")


HIDE_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"


@pytest.mark.parametrize(
    ("program", "compiler", "reason"),
    [
        (["setup.py"], "no-compiler", "there was no C++ compiler (no-compiler, of the environment variable CXX)"),
        (["-c", HIDE_TORCH], "c++", "there was no torch when it was installed"),
    ],
)
def test_a_package_without_libraries_says_what_was_missing(
    program: list[str], compiler: str, reason: str, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("rwkv_kernels", "tools", "csrc"):
        shutil.copytree(check_wheel.ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(check_wheel.ROOT / file, tmp_path)

    def build(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program, "--quiet", *arguments]
        environment = {**os.environ, "CXX": compiler, **variables}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    made = build("bdist_wheel", RWKV_KERNELS_CUDA="0")
    assert made.returncode == 0 and f"rwkv_kernels gets no libraries: {reason}" in made.stderr, made.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("rwkv_kernels/_why_no_library.txt").decode().startswith(reason)

    insisted = build("bdist_wheel", RWKV_KERNELS_CUDA="1")
    assert insisted.returncode != 0 and f"RWKV_KERNELS_CUDA=1, but {reason}" in insisted.stderr
    in_place = build("build_ext", "--inplace")
    assert in_place.returncode != 0 and f"nothing is built: {reason}" in in_place.stderr
