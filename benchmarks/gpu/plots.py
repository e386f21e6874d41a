"""Draws the tables of a record; nothing is measured or computed here."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.harness import Row


def draw(tables: dict[str, dict[str, Any]], directory: Path) -> None:
    """A picture for every table that says more as one."""
    for name, draw_table in {"operations": _operations, "crossover": _crossover, "peers": _peers}.items():
        if name in tables:
            figure = draw_table(tables[name]["rows"])
            figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight")
            plt.close(figure)


def _panels(count: int, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, count, figsize=(6 * count, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def _unique(rows: list[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _operations(rows: list[Row]) -> Any:
    return _bars(rows, lambda row: f"{row['backend']}, {row['schedule']}", "of copy", "part of the copy's bandwidth")


def _peers(rows: list[Row]) -> Any:
    figure = _bars(rows, lambda row: row["who"], "of our time", "time in units of ours")
    for axis in figure.axes:
        axis.set_xscale("log")
    return figure


def _bars(rows: list[Row], series: Any, column: str, label: str) -> Any:
    """A panel for every operation, a group of bars for every shape and dtype, a bar for every series."""
    operations = _unique(rows, "operation")
    cases = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(series(row) for row in rows))
    figure, axes = _panels(len(operations), 1 + 0.15 * len(cases) * (len(names) + 1))
    thickness = 0.8 / len(names)
    for axis, operation in zip(axes, operations, strict=True):
        for i, name in enumerate(names):
            chosen = [row for row in rows if row["operation"] == operation and series(row) == name]
            places = [cases.index((row["shape"], row["dtype"])) + i * thickness for row in chosen]
            axis.barh(places, [row[column] for row in chosen], thickness, label=name)
        middles = [i + (len(names) - 1) * thickness / 2 for i in range(len(cases))]
        axis.set_yticks(middles, [f"{shape}\n{dtype}" for shape, dtype in cases], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(operation)
        axis.set_xlabel(label)
    axes[0].legend(fontsize=7)
    return figure


def _crossover(rows: list[Row]) -> Any:
    sweeps = [(sweep, operation) for sweep in _unique(rows, "sweep") for operation in _unique(rows, "operation")]
    figure, axes = _panels(len(sweeps), 4)
    for axis, (sweep, operation) in zip(axes, sweeps, strict=True):
        chosen = [row for row in rows if (row["sweep"], row["operation"]) == (sweep, operation)]
        shapes = [row["shape"] for row in chosen]
        times = {name: [row[f"{name}, ms"] for row in chosen] for name in chosen[0]["_seconds"]}
        for name, milliseconds in times.items():
            axis.plot(shapes, milliseconds, marker=".", label=name)
        planned = [row[f"{row['planned']}, ms"] for row in chosen]
        axis.plot(shapes, planned, "o", fillstyle="none", markersize=10, color="black", label="planned")
        axis.set_yscale("log")
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.set_title(f"{operation}, over {sweep}")
        axis.set_ylabel("ms")
        axis.legend(fontsize=7)
    return figure
