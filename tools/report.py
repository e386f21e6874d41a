"""The form of the reports on compiled kernels: a short one in docs/ and all numbers in build/kernel-report/."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.records import Record, Row, Table

ROOT = Path(__file__).parent.parent
NUMBERS = ROOT / "build" / "kernel-report"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of the options that the reports share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser


def table(title: str, rows: list[Row]) -> str:
    """A heading and the rows in Markdown."""
    return Table(title, [], rows).markdown()


def pivot(rows: Iterable[Row], keys: Sequence[str], column: str, cell: Callable[[Row], object]) -> list[Row]:
    """A row for all that agree in the keys, with a column for each value of `column`."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        found.setdefault(values, dict(zip(keys, values, strict=True)))[row[column]] = cell(row)
    return list(found.values())


def write(name: str, title: str, rows: list[Row], short: Sequence[str]) -> None:
    """Writes docs/`name`-report.md of its paragraphs, and the rows as a record."""
    (ROOT / "docs" / f"{name}-report.md").write_text("\n\n".join(short) + "\n")
    Record(name, NUMBERS).add(title, [], rows)


def fail_for(complaints: Iterable[str]) -> None:
    """Ends the program with the complaints, if there are any."""
    if wrong := sorted(complaints):
        sys.exit("kernel report:\n" + "\n".join(wrong))
