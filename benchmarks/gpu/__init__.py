"""Measurements on a GPU, all in one process: `python -m benchmarks.gpu`."""
