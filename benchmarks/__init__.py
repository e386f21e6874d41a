"""Measurements that the documentation quotes: `python -m benchmarks`. docs/benchmarks.md explains them."""

from pathlib import Path

# Nothing of the package is imported here: tools/gpu_check.py reads this before the package is built.
ROOT = Path(__file__).resolve().parent.parent
DEVICES = ("cpu", "cuda")
CANNOT_RUN = 77  # the exit status of a benchmark that cannot run here and has printed the reason
