"""Measurements that the documentation quotes: `python -m benchmarks`. docs/benchmarks.md says how to read them."""
