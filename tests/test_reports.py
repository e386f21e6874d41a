"""The reports on compiled kernels: those in docs/ have the form and the limits of the programs that write them."""

import re
from pathlib import Path

import pytest
import report
import sass

pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")

import kernel_report

DOCS = Path(__file__).parent.parent / "docs"


def _without_counts(text: str) -> str:
    """The report without the numbers that are the compiler's: registers / blocks, and instructions / MUFU."""
    return re.sub(r"\| \d+ / \d+(?=( / \d+)? \|)|\| \d+\.\d / \d+\.\d(?= \|)", "| #", text)


def test_rows_become_columns() -> None:
    rows = [{"kernel": k, "gpu": gpu, "n": n} for k, gpu, n in [("a", "x", 1), ("b", "x", 2), ("a", "y", 3)]]
    assert report.pivot(rows, ("kernel",), "gpu", lambda row: 10 * row["n"]) == [
        {"kernel": "a", "x": 10, "y": 30},
        {"kernel": "b", "x": 20},
    ]


def test_the_report_in_docs_states_the_limits_that_are_checked() -> None:
    code = sass.Code(["FADD"] * 1000)
    compiled = {
        architecture: [
            kernel_report.Kernel(name, dtype, 32, 0, code if architecture in kernel_report.COUNTED else None)
            for name in kernel_report.NAMES.values()
            for dtype in kernel_report.DTYPES.values()
            if (name, dtype) in kernel_report.blocks(architecture)
        ]
        for architecture in kernel_report.DEVICES
    }
    committed = (DOCS / "kernel-report.md").read_text()
    (version,) = re.findall(r"nvcc ([\d.]+);", committed)
    expected = "\n\n".join(kernel_report.short_report(list(kernel_report.rows(compiled)), version)) + "\n"
    assert expected != committed and _without_counts(expected) == _without_counts(committed)


def test_the_triton_report_finds_the_counts_of_the_cuda_kernels() -> None:
    triton_report = pytest.importorskip("triton_report")
    counts = triton_report._cuda_counts()
    assert set(counts) == {(name, dtype) for name in ("forward", "backward") for dtype in triton_report.DTYPES.values()}
    table = (DOCS / "triton-report.md").read_text()
    for (name, dtype), count in counts.items():
        assert re.search(rf"^\| {name} \| plain \| {dtype} \| .* \| {count} \|$", table, re.MULTILINE)


def test_the_reports_fit_on_two_and_a_half_pages() -> None:
    assert sum(len((DOCS / f"{name}-report.md").read_text().splitlines()) for name in ("kernel", "triton")) <= 160
