"""`python -m benchmarks [part ...] [--smoke] [--results FOLDER]`."""

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness

PARTS = ["bandwidth", "peers", "migrating", "memory", "overhead", "accuracy"]


def main() -> None:
    """Measures, prints tables, and with --results keeps records: one JSON file for each part, and tables.md of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--results", type=Path, help="folder for the records")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    if len(parts) > 1:
        # Each in a process of its own: what one does to memory and caches must not meet the next.
        options = ["--smoke"] * arguments.smoke + (["--results", str(arguments.results)] if arguments.results else [])
        for name in parts:
            subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=True)
        return

    part = importlib.import_module(f"benchmarks.{parts[0]}")
    started = time.perf_counter()
    rows = part.run(arguments.smoke)
    if not rows:
        return
    print(f"\n## {part.TITLE}\n\n{harness.markdown_table(rows)}\n\n({time.perf_counter() - started:.0f} s)", flush=True)
    if arguments.results:
        harness.save(arguments.results, parts[0], part.TITLE, rows)
        harness.write_tables(arguments.results, PARTS)


if __name__ == "__main__":
    main()
