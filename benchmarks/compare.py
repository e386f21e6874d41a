"""Two records of one benchmark, row by row: slower or faster beyond the noise of either."""

from pathlib import Path
from typing import Any

from benchmarks.device import quartiles
from benchmarks.records import Record, Row, Table

TITLE = "{before} -> {after}: medians, the lower and upper quartile in brackets"
LEAST_SAMPLES = 3  # for a verdict
# Two records are comparable if they share these.
PLACE = ("device", "smoke", "processor", "threads", "instruction_set", "gpu")


class NotComparableError(Exception):
    """The records are of different things or places."""


def compare(before: Path, after: Path, tolerance: float) -> int:
    """Prints every timed row; the exit status is 0, or 1 if something is slower or gone, 2 if nothing can be compared.

    A row is slower if its median has grown by more than `tolerance` and its quartiles do not overlap with those before.
    """
    try:
        rows = compared(Record.load(before), Record.load(after), tolerance)
    except (NotComparableError, OSError, KeyError, TypeError, ValueError) as reason:
        print(f"{before} and {after} cannot be compared: {reason or 'one of them is not a record'}")
        return 2
    print(Table(TITLE.format(before=before, after=after), [], rows).markdown())
    verdicts = [row["verdict"] for row in rows]
    summary = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in summary.items()))
    return 1 if {"slower", "gone"} & set(verdicts) else 0


def compared(before: Record, after: Record, tolerance: float) -> list[Row]:
    """A row for everything that either record has timed."""
    if before.name != after.name:
        raise NotComparableError(f"one is of {before.name!r}, the other of {after.name!r}")
    for name in PLACE:
        places = [record.environment.get(name) for record in (before, after)]
        if places[0] != places[1]:
            raise NotComparableError(f"their {name} differs: {places[0]}, {places[1]}")
    old, new = _samples(before), _samples(after)
    if not old:
        raise NotComparableError(f"{before.name!r} has no times")
    return [_compared_row(key, old.get(key), new.get(key), tolerance) for key in dict.fromkeys([*old, *new])]


def _samples(record: Record) -> dict[str, list[float]]:
    """Seconds of every timed row, by its keys."""
    samples: dict[str, list[float]] = {}
    for table in record.tables:
        for row in table.rows:
            if "_seconds" not in row:
                continue
            key = ", ".join(str(row[key]) for key in table.keys)
            if key in samples:
                raise NotComparableError(f"{record.name!r} has measured {key!r} twice")
            samples[key] = row["_seconds"]
    return samples


def _compared_row(key: str, old: list[float] | None, new: list[float] | None, tolerance: float) -> Row:
    row: dict[str, Any] = {"what": key, "before, ms": _written(old), "after, ms": _written(new), "ratio": "-"}
    if old is None or new is None:
        return {**row, "verdict": "new" if old is None else "gone"}
    (old_low, old_median, old_high), (new_low, new_median, new_high) = quartiles(old), quartiles(new)
    ratio = new_median / old_median
    verdict = "the same" if min(len(old), len(new)) >= LEAST_SAMPLES else "too few to tell"
    if verdict != "the same":
        return {**row, "ratio": ratio, "verdict": verdict}
    if ratio > 1 + tolerance and new_low > old_high:
        verdict = "slower"
    if ratio < 1 / (1 + tolerance) and new_high < old_low:
        verdict = "faster"
    return {**row, "ratio": ratio, "verdict": verdict}


def _written(samples: list[float] | None) -> str:
    if samples is None:
        return "-"
    low, median, high = (1e3 * second for second in quartiles(samples))
    return f"{median:.4g} ({low:.4g} to {high:.4g})"
