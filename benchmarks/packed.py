"""Sequences of very different lengths: packed, padded to the longest, a call for each, and as a rectangle would be."""

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import rwkv_kernels
from benchmarks.device import Call, Device, backends, timed
from benchmarks.problem import Function, Problem, Shape, function_of, name_of
from benchmarks.records import Record, Row

TITLE = "Sequences with a heavy tail of lengths; memory is a training step's, its inputs and the gradient of y included"

SIZES = {"cuda": (2**16, 1024), "cpu": (2**14, 768), "smoke": (2**9, 64)}  # steps of all sequences, channels
# Pareto's distribution above the shortest, the longest being what a training run would cut: half are below 60 steps,
# the mean is about 110.
SHORTEST, TAIL, LONGEST = 32, 1.2, 1024
EQUAL = 128  # steps of every sequence of the rectangle
DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("packed", "padded", "one call each", "rectangle")
PATIENCE = 5.0  # seconds for the runs of the slowest way


def draw_lengths(total: int) -> list[int]:
    """The lengths of sequences that have `total` steps together, the same in every run."""
    draw = random.Random(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, LONGEST, int(SHORTEST * draw.paretovariate(TAIL))))
    return lengths


@dataclass(frozen=True)
class Way:
    """One of WAYS to compute sequences of these lengths by a backend."""

    name: str
    lengths: Sequence[int]
    backend: str

    def shape(self, channels: int) -> Shape:
        """Of k and v."""
        total = sum(self.lengths)
        if self.name == "padded":
            return len(self.lengths), max(self.lengths), channels
        return (total // EQUAL, EQUAL, channels) if self.name == "rectangle" else (1, total, channels)

    def function(self) -> Function:
        """The operator; its sequences lie as in `shape`."""
        if self.name == "one call each":
            return self._one_by_one
        if self.name != "packed":
            return function_of(self.backend)
        boundaries = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
        return lambda w, u, k, v: rwkv_kernels.wkv(w, u, k, v, cu_seqlens=boundaries, backend=self.backend)

    def problem(self, channels: int, dtype: torch.dtype) -> Problem:
        """Its inputs; what is right of sequences in one row is known without their being packed."""
        in_one_row = self.name in ("packed", "one call each")
        return Problem(self.shape(channels), dtype, exact=self._by_padding if in_one_row else None)

    def _one_by_one(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(k.split(self.lengths, 1), v.split(self.lengths, 1), strict=True)
        return torch.cat([rwkv_kernels.wkv(w, u, *piece, backend=self.backend) for piece in pieces], 1)

    def _by_padding(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (pad_sequence(x[0].split(self.lengths), batch_first=True) for x in (k, v))
        y = rwkv_kernels.wkv(w, u, *rows, backend="reference")
        return torch.cat([row[:steps] for row, steps in zip(y, self.lengths, strict=True)])[None]


def prepare_step(way: Way, channels: int, dtype: torch.dtype) -> Call:
    """A training step of the operator, on torch's default device."""
    problem, function = way.problem(channels, dtype), way.function()
    return lambda: problem.forward_and_backward(function)


def run(device: Device, record: Record) -> None:
    """A row for every dtype, backend, operation and way, each checked against float64 before it is timed."""
    total, channels = SIZES[device.scale]
    lengths = draw_lengths(total)
    rows: list[Row] = []
    for dtype in DTYPES:
        for backend in backends(device):
            with record.attempt(f"{name_of(dtype)}, {backend}"):
                rows += _rows(device, [Way(name, lengths, backend) for name in WAYS], channels, dtype)
                record.add(TITLE, ["dtype", "backend", "operation", "way"], rows)


def _rows(device: Device, ways: list[Way], channels: int, dtype: torch.dtype) -> list[Row]:
    forward: dict[str, Call] = {}
    backward: dict[str, Call] = {}
    errors: dict[str, float] = {}
    memory: dict[str, Row] = {}
    for way in ways:
        with device.default():
            problem, function = way.problem(channels, dtype), way.function()
        errors[way.name] = problem.check(function)
        forward[way.name] = lambda problem=problem, function=function: problem.forward(function)
        backward[way.name] = problem.prepare_backward(function)
        peak = device.peak_bytes(prepare_step, way, channels, dtype)
        memory[way.name] = {"MB": (peak + 3 * problem.k.nbytes) / 1e6} if peak is not None else {}
    rows: list[Row] = []
    for operation, calls in (("forward", forward), ("backward", backward)):
        seconds = device.patiently(calls, PATIENCE)
        packed = statistics.median(seconds["packed"])
        for way in ways:
            samples, (sequences, steps, _) = seconds[way.name], way.shape(channels)
            rows.append(
                {
                    "dtype": name_of(dtype),
                    "backend": way.backend,
                    "operation": operation,
                    "way": way.name,
                    "steps, padding included": sequences * steps,
                    **timed(samples),
                    "of packed": statistics.median(samples) / packed,
                    **memory[way.name],
                    "error": errors[way.name],
                }
            )
    return rows
