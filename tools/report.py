"""The form of the reports on compiled kernels: a short one in docs/ and all numbers in build/kernel-report/."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from benchmarks import ROOT
from benchmarks.records import Record, Row, Table

NUMBERS = ROOT / "build" / "kernel-report"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that the reports share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser


def table(title: str, rows: list[Row]) -> str:
    """A heading and the rows in Markdown."""
    return Table(title, [], rows).markdown()


def pivot(rows: Iterable[Row], keys: Sequence[str], column: str, cell: Callable[[Row], object]) -> list[Row]:
    """A row for each set of rows that agree in the keys, with a column for each value of `column`."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        found.setdefault(values, dict(zip(keys, values, strict=True)))[row[column]] = cell(row)
    return list(found.values())


def summarise(rows: list[Row], target: str, spilled: str) -> None:
    """Prints a line for each GPU; the other arguments name columns."""
    for name in dict.fromkeys(row[target] for row in rows):
        found = [row for row in rows if row[target] == name]
        most, spilling = max(row["registers"] for row in found), sum(row[spilled] > 0 for row in found)
        print(f"{name}: {len(found)} kernels, {most} registers at most, {spilling or 'none'} with spills")


def write(name: str, rows: list[Row], short: Sequence[str]) -> None:
    """Writes docs/`name`-report.md of its paragraphs, and the rows as a record."""
    (ROOT / "docs" / f"{name}-report.md").write_text("\n\n".join(short) + "\n")
    Record(name, NUMBERS).add(f"All numbers of the {name} report", [], rows)


def fail_for(complaints: Iterable[str]) -> None:
    """Ends the program with the complaints, if there are any."""
    if wrong := sorted(complaints):
        sys.exit("kernel report:\n" + "\n".join(wrong))
