"""`python -m benchmarks [part ...] [--smoke] [--results FOLDER]`."""

import argparse
import importlib
import time
from pathlib import Path

from benchmarks import harness

PARTS = ["bandwidth", "peers", "memory", "overhead", "accuracy"]


def main() -> None:
    """Runs the parts, prints their tables, and with --results keeps records and tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--results", type=Path, help="folder for NAME.json and tables.md")
    arguments = parser.parse_args()

    described = ", ".join(f"{name} {value}" for name, value in harness.environment().items())
    document = [f"Measured by `python -m benchmarks` on: {described}."]
    print(document[0])
    for name in arguments.parts or PARTS:
        part = importlib.import_module(f"benchmarks.{name}")
        started = time.perf_counter()
        rows = part.run(arguments.smoke)
        if not rows:
            continue
        section = f"\n## {part.TITLE}\n\n{harness.markdown_table(rows)}"
        print(f"{section}\n\n({name}: {time.perf_counter() - started:.0f} s)")
        document.append(section)
        if arguments.results:
            harness.save(arguments.results, name, rows)
    if arguments.results:
        (arguments.results / "tables.md").write_text("\n".join(document) + "\n")


if __name__ == "__main__":
    main()
