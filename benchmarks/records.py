"""Records: measurements with their raw samples and their environment, which a comparison needs."""

import json
import platform
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import rwkv_kernels

Row = dict[str, Any]

NOISY = 0.2


@dataclass
class Table:
    """Rows of one kind. `keys` are the columns that identify a row; hidden columns begin with an underscore."""

    title: str
    keys: list[str]
    rows: list[Row]

    def markdown(self) -> str:
        """The table, with a warning if its measurements are noisy."""
        names = [name for name in self.rows[0] if not name.startswith("_")]
        cells = [[_format(row.get(name, "-")) for name in names] for row in self.rows]
        lines = [names, ["---"] * len(names), *cells]
        text = f"## {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        noisy = sum(row.get("spread", 0) > NOISY for row in self.rows)
        warning = f"\n\nNoisy: in {noisy} of {len(self.rows)} rows the quartiles lie further apart than {NOISY:.0%}."
        return text + warning * (noisy > 0)


def _format(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.1e}" if value != 0 and abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    )


@dataclass
class Record:
    """The tables of one benchmark, kept in `folder`/`name`.json as they grow, unless folder is None."""

    name: str
    folder: Path | None = None
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    tables: list[Table] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Notes an exception of the block as a failure of `what`, and goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{what}: {type(error).__name__}: {error}")

    def add(self, title: str, keys: list[str], rows: list[Row]) -> None:
        """Saves a table, in place of an earlier one of this title, unless nothing was measured for it.

        Called after every case, it leaves a run that is interrupted with all cases but one.
        """
        if rows:
            self.tables = [table for table in self.tables if table.title != title] + [Table(title, keys, rows)]
            self.save()

    def show(self) -> None:
        """Prints all tables."""
        for table in self.tables:
            print(f"\n{table.markdown()}", flush=True)

    def save(self) -> None:
        """Writes all tables so far, a row a line."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = [
            f'{{"title": {json.dumps(table.title)}, "keys": {json.dumps(table.keys)}, "rows": [\n'
            + ",\n".join(json.dumps(row) for row in table.rows)
            + "\n]}"
            for table in self.tables
        ]
        (self.folder / f"{self.name}.json").write_text(
            f'{{"name": {json.dumps(self.name)},\n"environment": {json.dumps(self.environment)},\n'
            f'"failures": {json.dumps(self.failures)},\n"tables": [\n' + ",\n".join(tables) + "\n]}\n"
        )

    @classmethod
    def load(cls, path: Path) -> "Record":
        """The record that `save` has written."""
        content = json.loads(path.read_text())
        tables = [Table(**table) for table in content["tables"]]
        return cls(content["name"], path.parent, content["environment"], tables, content["failures"])


def records_in(folder: Path) -> list[Record]:
    """The records of a folder, by name."""
    return [Record.load(path) for path in sorted(folder.glob("*.json")) if '"tables"' in path.read_text()]


def write_tables(folder: Path) -> None:
    """Writes tables.md from the records that the folder has."""
    sections = []
    for record in records_in(folder):
        where = ", ".join(f"{key} {value}" for key, value in record.environment.items())
        options = f"--device {record.environment['device']}{' --smoke' * record.environment.get('smoke', False)}"
        command = f"python -m benchmarks {record.name} {options} --results {folder}"
        sections += [table.markdown() for table in record.tables]
        sections.append(f"`{command}`: {where}.")
    (folder / "tables.md").write_text("\n\n".join(sections) + "\n")


def environment(device: str = "cpu") -> dict[str, Any]:
    """The environment of a measurement on the device: versions, commit, processor."""
    return {
        "device": device,
        "rwkv_kernels": rwkv_kernels.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": rwkv_kernels.build_info().cpu_instruction_set,
        **(_gpu() if device == "cuda" else {}),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
    }


def _output(*command: str) -> str:
    """The output of a program, empty if it is not installed."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which(command[0]) else ""


def _processor() -> str:
    """The processor's name where the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
