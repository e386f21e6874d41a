"""The report of train_bytes.py: two plots and a page of Markdown."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")
mpl.rcParams.update(
    {
        "figure.figsize": (8, 4.5),
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlelocation": "left",
        "axes.titlesize": 13,
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "xtick.color": "#555555",
        "ytick.color": "#555555",
    }
)

COLOURS = {"RWKV": "#c2410c", "wkv": "#c2410c", "attention": "#1d4ed8", "zlib -9": "#1d4ed8", "order 0": "#57534e"}


class LossPoint(NamedTuple):
    """The training loss of one step, in bits per byte, and the tokens before it."""

    tokens: int
    bits: float


class Timing(NamedTuple):
    """Seconds of one call on a sequence, and its steps."""

    name: str
    steps: int
    seconds: float


def _new_plot(title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots()
    axes.set_title(title)
    return figure, axes


def _label(axes: Axes, text: str, x: float, y: float, name: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(8, 0),
        textcoords="offset points",
        verticalalignment="center",
        annotation_clip=False,
        color=COLOURS[name],
        weight="bold",
    )


def plot_loss(path: Path, history: list[LossPoint], bits: dict[str, float]) -> None:
    """The training loss of every step, faint, and its running mean; the codes' held-out results at the right edge."""
    figure, axes = _new_plot("Bits per byte while training, and on the held-out text")
    tokens = [point.tokens for point in history]
    span = max(1, len(history) // 100)
    losses = [point.bits for point in history]
    smooth = [statistics.fmean(losses[max(0, i - span) : i + span + 1]) for i in range(len(losses))]
    axes.plot(tokens, losses, color=COLOURS["RWKV"], alpha=0.2, linewidth=0.8)
    axes.plot(tokens, smooth, color=COLOURS["RWKV"], linewidth=2)
    axes.plot(tokens[-1:], bits["RWKV"], "o", color=COLOURS["RWKV"], clip_on=False, zorder=3)
    height = 0.0
    for name, value in sorted(bits.items(), key=lambda item: item[1]):
        if name != "RWKV":
            axes.axhline(value, color=COLOURS[name], linewidth=1.2, linestyle=(0, (5, 3)))
        height = max(value, height + 0.45)  # labels of nearby values would lie on each other
        _label(axes, f"{name}  {value:.2f}", tokens[-1], height, name)
    axes.set(xlim=(0, tokens[-1]), ylim=(0, 8.4), xlabel="bytes trained on")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
    axes.grid(axis="y", color="#eeeeee")
    figure.savefig(path)
    plt.close(figure)


def plot_times(path: Path, timings: list[Timing]) -> None:
    """Both operations against T, logarithmic either way, so that a power of T is a straight line."""
    figure, axes = _new_plot("Forward pass on one core: time per call")
    for name in ("attention", "wkv"):
        own = [timing for timing in timings if timing.name == name]
        axes.loglog([t.steps for t in own], [t.seconds for t in own], "o-", color=COLOURS[name], markersize=4)
        _label(axes, f"{name}, ~ T$^{{{growth(own):.1f}}}$", own[-1].steps, own[-1].seconds, name)
    steps = sorted({timing.steps for timing in timings})
    axes.set_xticks(steps, [f"{step // 1024}k" if step >= 1024 else str(step) for step in steps], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{1e3 * value:g} ms")
    axes.set_xlabel("sequence length T")
    axes.grid(color="#eeeeee")
    figure.savefig(path)
    plt.close(figure)


def growth(timings: list[Timing]) -> float:
    """The exponent p of seconds ~ T^p fitted to the longest five lengths."""
    longest = timings[-5:]
    return statistics.linear_regression([math.log(t.steps) for t in longest], [math.log(t.seconds) for t in longest])[0]


def write_report(
    folder: Path, history: list[LossPoint], bits: dict[str, float], timings: list[Timing], error: float, sample: str
) -> Path:
    """Writes report.md, loss.png and times.png into the folder, and returns the path of the first."""
    folder.mkdir(exist_ok=True)
    plot_loss(folder / "loss.png", history, bits)
    plot_times(folder / "times.png", timings)
    seconds = {(timing.name, timing.steps): timing.seconds for timing in timings}
    steps = sorted({timing.steps for timing in timings})
    cells = [
        [f"{1e3 * seconds[name, step]:.2f}" if (name, step) in seconds else "-" for name in ("wkv", "attention")]
        for step in steps
    ]
    lines = [
        "# A byte-level RWKV, trained on this machine",
        "",
        f"Trained on {history[-1].tokens:,} bytes in {len(history):,} steps. Held-out text, in bits per byte:",
        "",
        "| code | bits per byte |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in bits.items()),
        "",
        "![loss](loss.png)",
        "",
        f"The same weights run over a whole sequence or byte by byte; the logits differ by at most {error:.1e}.",
        "",
        "## Time against sequence length",
        "",
        "One forward call on one core in milliseconds, the operator and plain causal attention of the same width.",
        "",
        "![times](times.png)",
        "",
        "| T | wkv | attention |",
        "|---|---|---|",
        *(f"| {step:,} | {' | '.join(row)} |" for step, row in zip(steps, cells, strict=True)),
        "",
        "## Generated, byte by byte",
        "",
        "````text",
        sample,
        "````",
        "",
    ]
    report = folder / "report.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    return report
