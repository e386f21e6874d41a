"""The rules of the house that a reader relies on."""

import ast
import re
import warnings
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch

from rwkv_kernels import native
from rwkv_kernels.inputs import (
    ADJOINT_SUMMARY,
    BACKWARD,
    BI_BACKWARD,
    BI_FORWARD,
    FORWARD,
    MIXING_BACKWARD,
    MIXING_FORWARD,
    STEP,
    SUMMARY,
    BiInputs,
    Inputs,
)

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
    glue = {"ops.cpp", "common/tensor.h", "cpu/op.h", "cpu/op.cpp", "cpu/bidirectional.cpp", "cuda/op.cpp"}
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
    known = {"math.h": [], "params.h": [], "recurrence.h": ["math.h"], "bidirectional.h": ["recurrence.h"]}
    for name, included in known.items():
        assert re.findall(r'#include "(.+)"', (CSRC / "common" / name).read_text()) == included


def test_arithmetic_of_the_cpu_knows_no_tensors() -> None:
    included = {path.name: re.findall(r'#include "(.+)"', path.read_text()) for path in (CSRC / "cpu").iterdir()}
    assert {name for name, headers in included.items() if "../common/checks.h" in headers} == {"op.h"}
    assert {name for name, headers in included.items() if "op.h" in headers} == {"op.cpp", "bidirectional.cpp"}
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
    "shardings": {"native"},
    "functional": {"_backends", "autograd", "inputs", "reference", "shardings"},
    "nn": {"functional"},
    "distributed": {"_backends", "functional", "inputs", "native", "nn", "reference", "shardings"},
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
    schemas = {"wkv_forward": FORWARD, "_wkv_backward": BACKWARD, "wkv_step": STEP}
    schemas |= {"wkv_mixing_forward": MIXING_FORWARD, "_wkv_mixing_backward": MIXING_BACKWARD}
    schemas |= {"_wkv_summary": SUMMARY, "_wkv_adjoint_summary": ADJOINT_SUMMARY}
    schemas |= {"bi_wkv_forward": BI_FORWARD, "_bi_wkv_backward": BI_BACKWARD}
    for name, schema in schemas.items():
        operator = getattr(ops, name).default._schema
        assert str(operator) == str(torch._C.parse_schema(f"{native.NAMESPACE}::{name}{schema}"))
    for form, operator in ((Inputs, ops.wkv_mixing_forward), (BiInputs, ops.bi_wkv_forward)):
        arguments = [(x.name, str(x.type)) for x in operator.default._schema.arguments]
        annotations = [
            (name, "Optional[Tensor]" if "None" in str(x) else "Tensor") for name, x in form.__annotations__.items()
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


RECORD = ROOT / "benchmarks" / "results" / "cpu" / "tables.md"
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


def _recorded(heading: str) -> list[dict[str, str]]:
    """The rows of the record's table under the heading that begins so, by the names of their columns."""
    (section,) = (x for x in RECORD.read_text().split("\n## ") if x.removeprefix("## ").startswith(heading))
    names, _, *rows = (line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| "))
    return [dict(zip(names, row, strict=True)) for row in rows]


def _where(rows: list[dict[str, str]], **values: str) -> dict[str, str]:
    (row,) = (row for row in rows if all(row[name] == value for name, value in values.items()))
    return row


def _rounded(number: str, digits: int = 0, times: str = "1") -> str:
    """As by hand, halves up."""
    return str((Decimal(number) * Decimal(times)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def test_documents_quote_the_records() -> None:
    recorded = RECORD.read_text().splitlines()
    migrating = (ROOT / "docs" / "migrating.md").read_text()
    quoted = [line for line in migrating.splitlines() if re.match(r"\| \d+(, \d+, \d+)? \|", line)]
    assert len(quoted) == 16 + 20
    assert [line for line in quoted if line not in recorded] == []


def _measured() -> str:
    readme = (ROOT / "README.md").read_text()
    return readme[readme.index("\n## Measured\n") : readme.index("\n## Commands\n")]


def test_the_tables_of_the_readme_follow_from_the_record() -> None:
    operator, expected = _recorded("The operator"), []
    for shape in ("8, 1024, 768", "1, 16384, 768"):
        for dtype in ("float32", "bfloat16"):
            cells = [shape, dtype]
            for operation in ("forward", "backward"):
                row = _where(operator, shape=shape, dtype=dtype, operation=operation, gate="none", backend="cpu")
                cells += [_rounded(row["µs"], 1, "0.001"), f"{_rounded(row['of triad'], 0, '100')} %"]
            expected.append(cells)
    growth = [row for row in _recorded("Growth") if row["pass"] == "training step"]
    slower = [row for row in _recorded("From which T on") if row["pass"] == "training step"]
    for mixer in ("WKV", "attention, naive", "attention, torch flash", "AFT-full", "LSTM"):
        row, times = _where(growth, mixer=mixer), "1"
        if mixer != "WKV":
            compared = _where(slower, than=mixer)
            assert compared["at T"] == row["up to T"]
            times = compared["times faster there"]
        powers = [f"T^{_rounded(row[of], 2)}" for of in ("of time", "of memory")]
        expected.append([mixer, row["up to T"], _rounded(times, 1), *powers])
    rows = [line.strip("| ").split(" | ") for line in _measured().splitlines() if line.startswith("| ")]
    assert [row for row in rows if not {"---", "mixer", "B, T, C"} & {*row}] == expected


def test_the_sentences_of_the_readme_follow_from_the_record() -> None:
    (shortest,) = {row["from T"] for row in _recorded("From which T on") if row["pass"] == "training step"}
    assert shortest == min((row["T"] for row in _recorded("A token mixer against T")), key=int)
    generated = _recorded("Generation of one sequence")
    rwkv, transformer = (
        [_rounded(_where(generated, model=model, tokens="8192")[of], digits) for of, digits in columns]
        for model, columns in (
            ("RWKV, state", (("ms", 1), ("state or cache, MB", 2))),
            ("transformer, cache", (("ms", 1), ("state or cache, MB", 0))),
        )
    )
    (early,) = {_rounded(row["ms"], 1) for row in generated if row["tokens"] == "128"}
    shape = "4, 512, 768"
    loop = {
        row["operation"]: _rounded(row["of our time"])
        for row in _recorded("Peers")
        if row["shape"] == shape and row["who"] == "transformers 5.23.0, loop"
    }
    steps = [
        int(_rounded(row["times faster"]))
        for row in _recorded("transformers' RwkvForCausalLM")
        if row["operation"] == "training step" and row["code"] == "patched"
    ]
    call = _where(_recorded("Latency:"), what="cpu: wkv at (1, 1, 768)", way="eager")
    accuracy = [row for row in _recorded("Accuracy") if row["dtype"] == "float32"]
    errors = [float(row[of].split(" ")[0]) for row in accuracy for of in row if of not in ("T", "dtype", "backend")]
    sentences = [
        f"WKV is the fastest of them from T = {shortest} on, the shortest measured.",
        f"After 8192 others, a generated token takes {rwkv[0]} ms and a state of {rwkv[1]} MB; in a transformer of "
        f"equal size {transformer[0]} ms and a cache of {transformer[1]} MB. After 128 both take {early} ms.",
        f"Beside the loop of transformers 5.23.0 at ({shape}), the operator is {loop['forward']} times faster forward "
        f"and {loop['backward']} times backward; a training step of the whole model is {min(steps)} to "
        f"{max(steps)} times faster with [the patch](docs/migrating.md#transformers).",
        f"An eager call at (1, 1, 768) takes {_rounded(call['µs'])} µs.",
        f"Of float32 outputs and gradients, for T up to {max(int(row['T']) for row in accuracy)}, the largest error "
        f"against the float64 oracle is {max(errors):.1e} of the largest element.",
    ]
    listed = [" ".join(x.split()) for x in re.findall(r"^- ((?:.+\n(?:  .+\n)*))", _measured(), re.MULTILINE)]
    assert listed == sentences


def _anchors(document: Path) -> set[str]:
    """GitHub's anchors of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_architecture_names_functions_where_they_are() -> None:
    """Its rows begin with a file, which has the names that follow; its folders are those of the sources."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+\.\w+)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 25
    missing = []
    for file, cells in rows:
        code = (ROOT / file).read_text()
        missing += [(file, x) for x in re.findall(r"`(\w+)`", cells) if not re.search(rf"\b{x}\b", code)]
    assert missing == []
    folders = re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE)
    owned = {str(path.relative_to(ROOT)) for top in (CSRC, PACKAGE) for path in top.iterdir() if path.is_dir()}
    assert {x for x in folders if x.startswith(("csrc/", "rwkv_kernels/"))} == owned - {"rwkv_kernels/__pycache__"}
    assert all((ROOT / x).is_dir() for x in folders)


def test_no_include_points_against_the_architecture() -> None:
    """Of every chain `a.h → b.h, c.h → d.h` that docs/architecture.md draws beside a folder."""
    (drawn,) = re.findall(r"```text\n(.+?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    folder, pairs = CSRC, []
    for name, chains in re.findall(r"^(csrc/\w+)? +(.+)$", drawn, re.MULTILINE):
        folder = ROOT / name if name else folder
        for chain in chains.split(";"):
            groups = [re.findall(r"\w+\.(?:h|cpp)", group) for group in chain.split("→")]
            found = [[folder / x if (folder / x).exists() else CSRC / "common" / x for x in group] for group in groups]
            pairs += [(x, y) for i, group in enumerate(found) for x in group for later in found[i + 1 :] for y in later]
    assert len(pairs) > 50
    included = {x: re.findall(r'#include "(.+)"', x.read_text()) for x, _ in pairs}
    assert [(x, y) for x, y in pairs if y in {(x.parent / header).resolve() for header in included[x]}] == []


def test_links_between_documents_lead_somewhere() -> None:
    links = [(x, link) for x in DOCUMENTS for link in re.findall(r"\]\(([^)\s]+)\)", x.read_text())]
    relative = [(document, link) for document, link in links if not link.startswith("https://")]
    assert len(relative) > 50
    broken = []
    for document, link in relative:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert broken == []


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
