"""Measurements that the documentation quotes: `python -m benchmarks`, each part a module with `TITLE` and `run`."""
