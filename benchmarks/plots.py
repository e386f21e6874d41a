"""Draws records, and computes only the places of labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.records import Record, Row, records_in

mpl.rcParams.update(
    {
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.prop_cycle": mpl.cycler(
            color=["#c2410c", "#1d4ed8", "#0e7490", "#7c3aed", "#15803d", "#a16207", "#be185d", "#57534e"]
        ),
        "lines.markersize": 3,
        "legend.frameon": False,
        "legend.fontsize": 7,
    }
)


def draw(folder: Path) -> list[Path]:
    """Draws a picture beside every record that has a figure; returns their paths."""
    drawn = []
    for record in records_in(folder):
        if record.name in FIGURES and record.tables:
            figure = FIGURES[record.name](record)
            device = record.environment.get("gpu") or f"{record.environment['processor']}, CPU"
            figure.suptitle(f"{device}, torch {record.environment['torch']}", fontsize=8, color="#888888")
            drawn.append(folder / f"{record.name}.png")
            figure.savefig(drawn[-1])
            plt.close(figure)
    return drawn


def _panels(count: int, height: float, width: float = 6) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])


def _unique(rows: list[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _lengths(value: float, _: object = None) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _seconds(milliseconds: float, _: object = None) -> str:
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:g} s"
    return f"{milliseconds:g} ms" if milliseconds >= 1 else f"{milliseconds * 1e3:g} µs"


def _bytes(megabytes: float, _: object = None) -> str:
    return f"{megabytes / 1e3:g} GB" if megabytes >= 1e3 else f"{megabytes:g} MB"


def _lines(axis: Axes, rows: list[Row], series: str, x: str, y: str) -> None:
    """Logarithmic either way, so that a power of x is a straight line; every line has its name at its end."""
    ends = []
    for name in _unique(rows, series):
        own = [row for row in rows if row[series] == name and row.get(y, 0) > 0]
        if own:
            (line,) = axis.loglog([row[x] for row in own], [row[y] for row in own], "o-")
            ends.append((own[-1][y], own[-1][x], name, line.get_color()))
    # Names of lines that end side by side are moved apart, from the lowest up, and if they reach the top, down again.
    limits, apart, ends = axis.get_ylim(), 0.05, sorted(ends)
    heights: list[float] = []
    for y_end, x_end, *_ in ends:
        height = float(axis.transAxes.inverted().transform(axis.transData.transform((x_end, y_end)))[1])
        heights.append(max(height, heights[-1] + apart) if heights else height)
    heights = [min(height, 1 - apart * (len(ends) - 1 - i)) for i, height in enumerate(heights)]
    for height, (y_end, x_end, name, colour) in zip(heights, ends, strict=True):
        axis.annotate(
            name,
            (x_end, y_end),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6},
        )
    axis.set_ylim(limits)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_xticks(_unique(rows, x))
    axis.xaxis.set_major_formatter(_lengths)
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.set_xlabel(x, fontsize=9)
    axis.grid(color="#eeeeee")


def _curves(record: Record, series: str, x: str, *panels: tuple[str, Row, str, Callable[..., str]]) -> Figure:
    """A panel for each title, with the rows that agree with it, one of their columns and its unit."""
    figure, axes = _panels(len(panels), 4)
    for axis, (title, chosen, column, unit) in zip(axes, panels, strict=True):
        rows = [row for row in record.tables[0].rows if all(row[key] == value for key, value in chosen.items())]
        _lines(axis, rows, series, x, column)
        axis.yaxis.set_major_formatter(unit)
        axis.set_title(title)
    return figure


def _attention(record: Record) -> Figure:
    training = {"pass": "training step"}
    return _curves(
        record,
        "mixer",
        "T",
        ("time of forward", {"pass": "forward"}, "ms", _seconds),
        ("time of a training step", training, "ms", _seconds),
        ("memory of a training step", training, "MB", _bytes),
    )


def _decode(record: Record) -> Figure:
    return _curves(
        record,
        "model",
        "tokens",
        ("time of a token after so many", {}, "ms", _seconds),
        ("time of all tokens", {}, "all of them, s", lambda seconds, _: _seconds(1e3 * seconds)),
        ("what is kept of them", {}, "state or cache, MB", _bytes),
    )


def _train(record: Record) -> Figure:
    rate = ("tokens trained on per second", {}, "tokens/s", lambda value, _: f"{value:,.0f}")
    return _curves(record, "model", "T", rate)


def _op(record: Record) -> Figure:
    gated = {"none": "", "operator": ", gated", "torch": ", gated by torch"}
    rows = [{**row, "backend": row["backend"] + gated[row["gate"]]} for row in record.tables[0].rows]
    figure = _bars(rows, "backend", "of triad")
    for axis in figure.axes:
        axis.axvline(1, color="#888888", linewidth=0.8)
        axis.set_xlabel("minimal bytes over time, as a part of a triad's bandwidth")
    return figure


def _peers(record: Record) -> Figure:
    figure = _bars(record.tables[0].rows, "who", "of our time")
    for axis in figure.axes:
        axis.set_xscale("log")
        axis.set_xlabel("time in units of ours")
    return figure


def _bars(rows: list[Row], series: str, column: str) -> Figure:
    """A panel for every operation, a group of bars for every shape and dtype, a bar for every series."""
    operations = _unique(rows, "operation")
    cases = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    names = _unique(rows, series)
    figure, axes = _panels(len(operations), 2 + 0.15 * len(cases) * (len(names) + 1))
    thickness = 0.8 / len(names)
    for axis, operation in zip(axes, operations, strict=True):
        for i, name in enumerate(names):
            chosen = [row for row in rows if (row["operation"], row[series]) == (operation, name)]
            places = [cases.index((row["shape"], row["dtype"])) + i * thickness for row in chosen]
            axis.barh(places, [row[column] for row in chosen], thickness, label=name)
        middles = [i + (len(names) - 1) * thickness / 2 for i in range(len(cases))]
        axis.set_yticks(middles, [f"{shape}  {dtype}" for shape, dtype in cases], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(operation)
    if len(names) > 1:
        axes[0].legend()
    return figure


FIGURES: dict[str, Callable[[Record], Figure]] = {
    "attention": _attention,
    "decode": _decode,
    "train": _train,
    "op": _op,
    "peers": _peers,
}
