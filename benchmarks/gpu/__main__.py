"""`python -m benchmarks.gpu [--device cuda|cpu] [--results FOLDER] [--peer NAME=FILE ...]`."""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import crossover, latency, operations, peers, plots
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import Device


def named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, Path(path).expanduser()


def main() -> int:
    """Measures on a GPU, in one process; on a CPU it runs small sizes, to see that everything works."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--results", type=Path, default=Path("build/gpu-check"), help="folder of the record and the plots"
    )
    parser.add_argument("--peer", type=named_file, action="append", default=[], help="see benchmarks/gpu/peers.py")
    arguments = parser.parse_args()

    device, report = Device(arguments.device), Report(arguments.results)
    torch.set_default_device(arguments.device)
    started = time.perf_counter()

    bandwidth, samples = device.copy_bandwidth()
    report.add("copy", "Bandwidth of a copy", [{"GB/s": bandwidth / 1e9, "_seconds": samples}])
    report.add("operations", operations.TITLE, operations.run(device, report, bandwidth))
    if "cuda" in operations.backends(device):
        report.add("crossover", crossover.TITLE, crossover.run(device, report))
    with report.attempt("latency"):
        report.add("latency", latency.TITLE, latency.run(device))
    # Last, because a peer that leaves the GPU in an error takes the process with it.
    with report.attempt("peers"):
        report.add("peers", peers.TITLE, peers.run(device, dict(arguments.peer)))
    with report.attempt("plots"):
        plots.draw(report.tables, report.directory)
    report.save()

    for failure in report.failures:
        print(f"FAILED {failure}")
    print(f"\n{report.directory}/benchmark.json, {time.perf_counter() - started:.0f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
