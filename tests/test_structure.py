"""The rules of the house that a reader relies on."""

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch

from rwkv_kernels import native
from rwkv_kernels.inputs import BACKWARD, FORWARD, STEP, Inputs

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "rwkv_kernels"
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


def _imports(path: Path) -> set[str]:
    """The package's own modules that one of them imports: relatively, so that the package may have any name."""
    folder = path.relative_to(PACKAGE).parent.parts
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(name.split(".")[0] == "rwkv_kernels" for name in imported), f"{path} imports absolutely"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            tails = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {".".join([*base, tail]) for tail in tails}
    return names


def test_every_package_is_installed() -> None:
    listed = re.findall(r"^packages = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[0]
    found = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
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


# The imports that are allowed to a module; to a folder's modules, those of the same folder besides.
MAY_IMPORT = {
    "reference": set(),
    "native": set(),
    "version": set(),
    "inputs": {"reference"},
    "autograd": {"inputs", "reference"},
    "build": {"native"},
    "_backends": {"autograd", "inputs", "native", "reference"},
    "functional": {"_backends", "autograd", "inputs", "reference"},
    "nn": {"functional"},
    "compat": {"functional", "nn"},
    "compat.torchscript": {"functional", "native"},  # which registers an operator in the library's namespace
    "_backends.registry": {"inputs", "_backends.recomputation"},  # no backend
    "_backends.triton.plan": set(),
    "_backends.triton.kernels": {"_backends.triton.plan", "reference"},
}


def test_the_schemas_are_the_same_in_cpp_and_in_python() -> None:
    if native.operators.why_missing is not None:
        pytest.skip(native.operators.why_missing)
    ops = getattr(torch.ops, native.NAMESPACE)
    for name, schema in (("wkv_forward", FORWARD), ("_wkv_backward", BACKWARD), ("wkv_step", STEP)):
        operator = getattr(ops, name).default._schema
        assert str(operator) == str(torch._C.parse_schema(f"{native.NAMESPACE}::{name}{schema}"))
    arguments = [(x.name, str(x.type)) for x in ops.wkv_forward.default._schema.arguments]
    annotations = [
        (name, "Optional[Tensor]" if "None" in str(x) else "Tensor") for name, x in Inputs.__annotations__.items()
    ]
    assert arguments == [*annotations, ("checkpoint", "bool")]


def test_python_modules_import_downwards_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module in ("__init__", "__main__"):
            continue
        layer = module.split(".")[0]
        allowed = MAY_IMPORT[layer] | {layer} if module not in MAY_IMPORT else MAY_IMPORT[module]
        above = {name for name in _imports(path) if name not in allowed and name.split(".")[0] not in allowed}
        assert above == set(), f"{module} imports {sorted(above)}"


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


def test_no_comment_or_docstring_opens_with_what() -> None:
    """The subject comes first; `# What` also where a comment follows code."""
    opener = re.compile(r"""(^|\s)(#|//+|\"\"\") *What """, re.MULTILINE)
    patterns = ("csrc/**/*", "hub/*", "tests/*.c*", "tools/**/*.h", "tools/*.sh", "examples/**/*.cpp")
    files = [*_python_files(), *(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())]
    texts = {path: path.read_text() for path in files}
    assert {path.suffix for path in files} >= {".py", ".h", ".cpp", ".cu", ".def", ".toml", ".sh"}
    found = {path: [text[m.start() :].split("\n")[0] for m in opener.finditer(text)] for path, text in texts.items()}
    assert {str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines} == {}
