"""`python -m benchmarks BENCHMARK [...]`, or `all` of them, or `compare` and `plots` of their records."""

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import CANNOT_RUN, DEVICES
from benchmarks.compare import compare
from benchmarks.device import Device, keep_freed_memory
from benchmarks.records import Record, environment, write_tables

# The modules of this package that measure, and the devices of those that do not run on all.
BENCHMARKS = (
    "op",
    "packed",
    "counters",
    "latency",
    "attention",
    "bidirectional",
    "decode",
    "train",
    "accuracy",
    "migrating",
    "peers",
    "published",
)
ONLY_ON = {"counters": ("cuda",), "published": ("cpu",)}


def _named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, Path(path).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--device", choices=DEVICES, help="default: a GPU, if there is one and the benchmark runs on it"
    )
    common.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    common.add_argument("--results", type=Path, help="folder for the record; `plots` draws it")
    common.add_argument(
        "--peer", type=_named_file, action="append", default=[], metavar="NAME=FILE", help="see benchmarks/peers.py"
    )
    commands.add_parser("all", parents=[common], help="every benchmark of the device, each in a separate process")
    for name in BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, parents=[common], help=module.__doc__, description=module.__doc__)
        if name == "latency":
            command.add_argument("--beside", type=Path, metavar="TREE", help="small calls of another tree, too")
    comparison = commands.add_parser("compare", help=compare.__doc__, description=compare.__doc__)
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.add_argument("--tolerance", type=float, default=0.1, help="of the median (default: %(default)s)")
    plots = commands.add_parser("plots", help="draws the records of a folder, and writes their tables")
    plots.add_argument("folder", type=Path)
    return parser


def _run_all(arguments: argparse.Namespace, options: list[str]) -> int:
    # Each runs in a separate process: its effect on memory and caches, or its crash, must not reach the next.
    names = [name for name in BENCHMARKS if arguments.device in ONLY_ON.get(name, DEVICES)]
    status = {name: subprocess.run([sys.executable, "-m", "benchmarks", name, *options]).returncode for name in names}
    failed = [name for name in names if status[name] not in (0, CANNOT_RUN)]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def _run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    keep_freed_memory()
    device = Device(arguments.device, arguments.smoke)
    record = Record(arguments.command, arguments.results, environment(device.type) | {"smoke": device.smoke})
    module = importlib.import_module(f"benchmarks.{arguments.command}")
    own = {"peers": [dict(arguments.peer)], "latency": [vars(arguments).get("beside")]}.get(arguments.command, [])
    try:
        with record.attempt(arguments.command):
            module.run(device, record, *own)
    except KeyboardInterrupt:
        record.failures.append("interrupted: what it had measured until then is kept")
    record.save()
    record.show()
    for failure in record.failures:
        print(f"FAILED {failure}")
    print(f"\n({arguments.command}: {time.perf_counter() - started:.0f} s)", flush=True)
    return 1 if record.failures else 0


def _draw(folder: Path) -> None:
    from benchmarks import plots  # only this command needs matplotlib

    plots.draw(folder)
    write_tables(folder)


def main(options: list[str]) -> int:
    """Runs one command; the exit status is 0 if nothing failed."""
    parser = _parser()
    arguments = parser.parse_args(options)
    if arguments.command == "compare":
        return compare(arguments.before, arguments.after, arguments.tolerance)
    if arguments.command == "plots":
        _draw(arguments.folder)
        return 0
    devices = ONLY_ON.get(arguments.command, DEVICES)
    if arguments.device is None:
        arguments.device = "cuda" if "cuda" in devices and torch.cuda.is_available() else "cpu"
    if arguments.device not in devices:
        print(f"{arguments.command} runs on {' and '.join(devices)}, not on {arguments.device}", file=sys.stderr)
        return CANNOT_RUN
    return _run_all(arguments, options[1:]) if arguments.command == "all" else _run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
