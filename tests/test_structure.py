"""The rules of the house that a reader relies on."""

import ast
import re
import warnings
from pathlib import Path

from rwkv_kernels import native

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
TORCH_HEADERS = re.compile(r"#include <((?:torch|ATen|c10|caffe2)/[^>]+)>")
STABLE_HEADERS = ("torch/csrc/stable/", "torch/headeronly/")


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in CSRC.rglob(pattern))


def test_every_translation_unit_is_in_a_library_of_both_builds() -> None:
    setup = re.findall(r"[( ]sources\((.+)\),", (ROOT / "setup.py").read_text())
    by_setup = [set(re.findall(r'"(.+?)"', arguments)) for arguments in setup]
    assert len(by_setup) == 3 and set().union(
        *(CSRC.glob(pattern) for patterns in by_setup for pattern in patterns)
    ) == {*_sources("*.cpp", "*.cu")}
    cmake = re.findall(r"add_(?:torch_library|module)\((.+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert [set(re.findall(r"csrc/(\S+)", arguments)) for arguments in cmake if "csrc/" in arguments] == by_setup


def test_torch_is_used_by_its_stable_interface_alone_and_in_the_glue_alone() -> None:
    users = {
        str(path.relative_to(CSRC)): TORCH_HEADERS.findall(path.read_text())
        for path in _sources("*.h", "*.cpp", "*.cu*")
    }
    glue = {"ops.cpp", "common/tensor.h", "cpu/op.cpp", "cuda/op.cpp"}
    assert {name for name, headers in users.items() if headers} == glue
    assert [header for headers in users.values() for header in headers if not header.startswith(STABLE_HEADERS)] == []


def test_gpu_kernels_know_a_toolkit_in_one_header_alone() -> None:
    users = {
        path.name
        for path in (CSRC / "gpu").iterdir()
        if re.search(r"#include <(?:cu|hip|math_constants)", path.read_text())
    }
    assert users == {"target.h"}
    with_torch = {path.name for path in (CSRC / "gpu").iterdir() if "../common/checks.h" in path.read_text()}
    assert with_torch == {"op.h"}
    kernels = [CSRC / "cuda" / "kernels.cu", CSRC / "cuda" / "kernels.h", CSRC / "gpu" / "kernels.h"]
    assert [path.name for path in kernels if "op.h" in path.read_text()] == []


def test_pybind11_stays_in_the_introspection_module() -> None:
    users = {p.name for p in _sources("*.h", "*.cpp", "*.cu*") if "#include <pybind11" in p.read_text()}
    assert users == {"introspection.cpp"}


def test_the_maths_needs_the_standard_library_only() -> None:
    for name, included in (("math.h", []), ("params.h", []), ("recurrence.h", ["math.h"])):
        assert re.findall(r'#include "(.+)"', (CSRC / "common" / name).read_text()) == included


def test_arithmetic_of_the_cpu_knows_no_tensors() -> None:
    included = {path.name: re.findall(r'#include "(.+)"', path.read_text()) for path in (CSRC / "cpu").iterdir()}
    assert {name for name, headers in included.items() if "../common/checks.h" in headers} == {"op.cpp"}
    assert {name for name, headers in included.items() if "../common/math.h" in headers} == {"joins.h"}


def _imports(module: str) -> set[str]:
    """The package's own modules that one of them imports: relatively, so that the package may have any name."""
    tree = ast.parse((ROOT / "rwkv_kernels" / f"{module}.py").read_text())
    folder = module.split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(name.split(".")[0] == "rwkv_kernels" for name in imported), f"{module} imports absolutely"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            tails = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {".".join([*base, tail]) for tail in tails}
    return names


def test_every_package_is_installed() -> None:
    listed = re.findall(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "rwkv_kernels").rglob("__init__.py")}
    assert sorted(ast.literal_eval(listed)) == sorted(".".join(path.parts) for path in found)


def test_the_oldest_torch_is_the_same_wherever_it_is_said() -> None:
    """The package, its requirement, what the builds bar, what a wheel is audited and tested for, the hub's ABI."""
    major, minor = native.OLDEST_TORCH
    said = {
        "pyproject.toml": f'dependencies = ["torch>={major}.{minor}"]',
        "setup.py": f"OLDEST_TORCH = ({major}, {minor})\n",
        "CMakeLists.txt": f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000 ",
        "tools/cross_compile.py": f'TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"',
        "tools/check_wheel.py": f"OLDEST_TORCH = ({major}, {minor})\n",
        "tests/gpu_host.py": f'TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"',
        "tests/test_host_path.py": f'TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"',
        "Makefile": f"torch=={major}.{minor}.*\n",
        "hub/build.toml": f'cpu = "{major}.{minor}"\ncuda = "{major}.{minor}"\n',
    }
    assert [name for name, words in said.items() if words not in (ROOT / name).read_text()] == []


def test_python_modules_import_downwards_only() -> None:
    assert _imports("reference") == set()
    assert _imports("native") == set()
    assert _imports("autograd") == set()
    assert _imports("triton_plan") == set()
    assert _imports("triton_kernels") == {"triton_plan"}
    assert _imports("triton_backend") <= {"autograd", "native", "reference", "triton_plan", "triton_kernels"}
    assert _imports("recomputation") == set()
    assert _imports("registry") <= {"autograd", "native", "recomputation", "reference", "triton_backend"}
    assert _imports("functional") <= {"registry", "reference"}
    assert _imports("build") == {"native"}
    assert _imports("compat/torchscript") == {"functional", "native"}
    assert _imports("nn/files") == set()
    assert _imports("nn/checkpoints") <= {"nn.files"}
    assert _imports("nn/padding") <= {"functional"}
    assert _imports("nn/layers") <= {"functional", "nn.padding", "nn.state"}
    for path in (ROOT / "rwkv_kernels").glob("*/*.py"):
        module = str(path.relative_to(ROOT / "rwkv_kernels").with_suffix(""))
        if module == "compat/torchscript":  # which registers an operator in the library's namespace
            continue
        assert {name for name in _imports(module) if not name.startswith("nn")} <= {"functional", "compat.torchscript"}


def test_documents_quote_the_records() -> None:
    recorded = (ROOT / "benchmarks" / "results" / "cpu" / "tables.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text()
    measured = readme[readme.index("## Measured") : readme.index("## Read the code")]
    migrating = (ROOT / "docs" / "migrating.md").read_text()
    quoted = [line for line in measured.splitlines() if line.startswith("| ")]
    quoted += [line for line in migrating.splitlines() if re.match(r"\| \d+, \d+, \d+ \|", line)]
    assert len(quoted) > 20
    assert [line for line in quoted if line not in recorded] == []


def test_what_the_readme_says_beside_peers_is_their_record() -> None:
    records = (ROOT / "benchmarks" / "results" / "cpu" / "tables.md").read_text()
    readme = (ROOT / "README.md").read_text()
    shape, forward, backward, file, anchor = re.findall(
        r"at \(([\d, ]+)\), by `python -m benchmarks peers`:\n\[(\d+) times faster forward, (\d+) times backward\]"
        r"\((.*)#(.*)\)",
        readme,
    )[0]
    assert (ROOT / file).read_text() == records
    # GitHub's anchor of a heading: lower case, no punctuation, hyphens for spaces.
    headings = {re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-"): line for line in records.splitlines()}
    table = records[records.index(headings[anchor]) :].split("\n## ")[0]
    assert "`python -m benchmarks peers " in table
    for operation, times in (("forward", forward), ("backward", backward)):
        start = f"| {shape} | float32 | {operation} | transformers 5.23.0, loop | "
        (row,) = (line.removeprefix(start) for line in table.splitlines() if line.startswith(start))
        assert round(float(row.split(" | ")[2])) == int(times)


def _python_files() -> list[Path]:
    folders = ("rwkv_kernels", "benchmarks", "examples", "tests", "tools")
    return [ROOT / "setup.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def test_every_file_is_python_3_10_and_has_no_doubtful_syntax() -> None:
    assert len(_python_files()) > 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in _python_files():
            text = path.read_text()
            ast.parse(text, str(path), feature_version=(3, 10))
            compile(text, str(path), "exec")
