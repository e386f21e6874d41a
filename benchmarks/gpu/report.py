"""What the benchmark found: tables, printed and saved as they come, and whatever failed on the way."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness


@dataclass
class Report:
    """The record, kept in `directory`/benchmark.json; a failure stops only what it happened in."""

    directory: Path
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Notes what the block raises as a failure of `what`, and goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{what}: {type(error).__name__}: {error}")

    def add(self, name: str, title: str, rows: list[harness.Row]) -> None:
        """Prints and saves a table, unless nothing was measured for it."""
        if not rows:
            return
        print(f"\n## {title}\n\n{harness.markdown_table(rows)}", flush=True)
        self.tables[name] = {"title": title, "rows": rows}
        self.save()

    def save(self) -> None:
        """Writes what there is so far."""
        self.directory.mkdir(parents=True, exist_ok=True)
        record = {"environment": harness.environment(), "tables": self.tables, "failures": self.failures}
        (self.directory / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n")
