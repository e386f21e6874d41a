"""Compares the CPU operators of two builds bit for bit, and names every output that differs.

python tools/same_outputs.py TREE                       # this tree and another one, which has its own build
python tools/same_outputs.py TREE --python PYTHON       # the other tree under another Python, so another torch

A tree is a folder that holds a built package rwkv_kernels: a clone or a site-packages. Each runs in a separate
process over the same inputs and prints digests; nothing but the operators of torch.ops.rwkv_kernels is called, so that
builds of any age can be compared. `ATEN_CPU_CAPABILITY=avx2` in the environment reaches both.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 30  # differences that are printed
PRINT = "print"  # the argument that makes a tree's process print its digests

THREADS = (1, 2, 4)
DTYPES = ("float32", "float16", "bfloat16", "float64")

# Nothing at all; one step; widths off and on a vector and a cache line; T around the checkpoint intervals, 64 and 128.
SHAPES = (
    *((0, 3, 4), (2, 0, 5), (2, 3, 0), (1, 1, 1), (3, 1, 64), (2, 7, 5), (2, 16, 33), (1, 63, 64), (2, 64, 65)),
    *((1, 65, 64), (2, 127, 7), (1, 128, 100), (1, 129, 17), (2, 300, 130), (5, 200, 200), (3, 513, 64), (1, 2000, 3)),
)
# Few channels and many steps: several threads split these over time, float64 from twice the length on.
SPLIT = ((1, 512, 64), (1, 700, 63), (1, 1100, 64), (2, 1100, 60), (1, 2100, 64), (1, 2049, 1), (1, 4100, 33))


# ---- cases ----


@dataclass(frozen=True)
class Case:
    """One problem, for every operator. `k_scale` multiplies the keys; the others name entries of the tables below."""

    B: int
    T: int
    C: int
    dtype: str = "float32"
    w_dtype: str = "float32"
    u_dtype: str = "float32"
    threads: int = 2
    state: str = "given"
    layout: str = "contiguous"
    special: str = "none"
    k_scale: float = 1.0

    def __str__(self) -> str:
        parameters = f"w {self.w_dtype}, u {self.u_dtype}, state {self.state}, {self.layout}, special {self.special}"
        shape = f"({self.B}, {self.T}, {self.C})"
        return f"{shape} {self.dtype}, {self.threads} threads, {parameters}, keys times {self.k_scale:g}"


def cases() -> Iterator[Case]:
    """Every case, in an order that does not change."""
    for shape, dtype, threads in itertools.product(SHAPES + SPLIT, DTYPES, THREADS):
        yield Case(*shape, dtype, threads=threads)
    for dtype, w_dtype, u_dtype in itertools.product(DTYPES, repeat=3):
        yield Case(2, 70, 37, dtype, w_dtype, u_dtype)
    # One chunk, and chunks that are joined.
    for shape, dtype in itertools.product([(2, 70, 37), (1, 2100, 64)], DTYPES):
        base = Case(*shape, dtype, threads=4)
        yield from (replace(base, state=state) for state in ("none", *STATES))
        yield from (replace(base, layout=layout) for layout in LAYOUTS)
        yield from (replace(base, special=special) for special in SPECIALS)
        yield from (replace(base, k_scale=scale) for scale in (1e-3, 30.0, 1e4))


# ---- inputs, of Python's own numbers: torch's may depend on its version and on the instruction set ----


class Numbers:
    """Draws tensors from one fixed list of normal numbers, each from the end of the one before."""

    def __init__(self) -> None:
        draw = random.Random(0)
        self.pool = torch.tensor([draw.gauss(0, 1) for _ in range(100_003)], dtype=torch.float64)
        self.next = 0

    def draw(self, *shape: int) -> Tensor:
        """A tensor of this shape in float64."""
        count = torch.Size(shape).numel()
        indices = torch.arange(self.next, self.next + count) % len(self.pool)
        self.next += count
        return self.pool[indices].view(shape)


Change = Callable[[Tensor], None]


def _set(position: Any, value: float) -> Change:
    def change(tensor: Tensor) -> None:
        tensor[position] = value

    return change


def _each_of(values: dict[int, float]) -> Change:
    """Sets channels to values, as far as both go."""

    def change(tensor: Tensor) -> None:
        for channel, value in values.items():
            if channel < tensor.shape[-1]:
                tensor[..., channel] = value

    return change


NAN, INFINITY = float("nan"), float("inf")
ODD = {0: NAN, 1: INFINITY, 2: -INFINITY}


def _state_part(row: int, values: dict[int, float]) -> Change:
    return lambda state: _each_of(values)(state[:, row])


# Changes of a given state (num, den, max).
STATES: dict[str, list[Change]] = {
    "empty": [_set((slice(None), slice(0, 2)), 0.0), _set((slice(None), 2), -1e38)],
    "den 0": [_set((slice(None), 1, slice(None, None, 2)), 0.0), _state_part(0, ODD), _state_part(2, ODD)],
    "den -0": [_set((slice(None), 1, slice(None, None, 3)), -0.0)],
    "odd num": [_state_part(0, ODD)],
    "odd den": [_state_part(1, ODD)],
    "odd max": [_state_part(2, ODD)],
    "large": [_state_part(0, {0: 1e30, 1: -1e30}), _state_part(2, {2: 1e4, 3: -1e4, 4: 3e38})],
}

# Changes of an argument.
SPECIALS: dict[str, tuple[str, Change]] = {
    "odd k": ("k", lambda k: _each_of(ODD)(k[:, 1])),
    "odd last k": ("k", lambda k: _each_of(ODD)(k[:, -1])),
    "odd v": ("v", lambda v: _each_of(ODD)(v[:, 1])),
    "odd gy": ("gy", lambda gy: _each_of(ODD)(gy[:, 1])),
    "odd r": ("r", _each_of(ODD)),
    "odd gstate": ("gstate", _each_of(ODD)),
    "subnormal v": ("v", _each_of({0: 1e-40, 1: 1e-7, 2: -1e-310})),
    # The log-decay is -exp(w).
    "odd w": ("w", _each_of(ODD)),
    "extreme w": ("w", _each_of({0: -1e4, 1: -100.0, 2: -20.0, 3: 5.0, 4: 20.0, 5: 89.0, 6: 1e4})),
    "odd u": ("u", _each_of(ODD)),
    "extreme u": ("u", _each_of({0: 1e4, 1: -1e4, 2: 100.0, 3: -100.0, 4: 0.0, 5: -0.0})),
}

# How a tensor lies in memory; the first three do not fit a [C] and leave it as it is.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch and time swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x,
    "time and channels swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x,
    "reversed axes": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every other channel": lambda x: _into(x, (*x.shape[:-1], 2 * x.shape[-1]), (..., slice(None, None, 2))),
    "channels from the second on": lambda x: _into(x, (*x.shape[:-1], x.shape[-1] + 3), (..., slice(1, -2))),
    "every third row": lambda x: _into(x, (3 * x.shape[0], *x.shape[1:]), slice(1, None, 3)),
    "every third step": lambda x: (
        _into(x, (x.shape[0], 3 * x.shape[1], *x.shape[2:]), (slice(None), slice(2, None, 3))) if x.dim() > 1 else x
    ),
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one step expanded": lambda x: x[:, :1].expand_as(x) if x.dim() > 1 else x,
    "one channel expanded": lambda x: x[..., :1].expand_as(x),
}


def _into(x: Tensor, shape: tuple[int, ...], where: Any) -> Tensor:
    """A view of a larger tensor that holds x; no kernel may read or write the rest."""
    view = x.new_full(shape, NAN)[where]
    view.copy_(x)
    return view


def inputs_of(case: Case, numbers: Numbers) -> dict[str, Tensor]:
    """The arguments by name; kt, vt and r are those of a step."""
    B, T, C = case.B, case.T, case.C
    dtype = getattr(torch, case.dtype)
    state_dtype = torch.float64 if case.dtype == "float64" else torch.float32
    state = numbers.draw(B, 3, C)
    state[:, 1] = state[:, 1].abs() + 0.1
    given = {
        "w": numbers.draw(C) - 1,
        "u": numbers.draw(C),
        "k": numbers.draw(B, T, C) * case.k_scale,
        "v": numbers.draw(B, T, C),
        "gy": numbers.draw(B, T, C),
        "r": numbers.draw(B, C),
        "state": state,
        "gstate": numbers.draw(B, 3, C),
    }
    for change in STATES.get(case.state, []):
        change(state)
    if case.special in SPECIALS:
        name, change = SPECIALS[case.special]
        change(given[name])
    token = (given["k"][:, 0], given["v"][:, 0]) if T > 0 else (numbers.draw(B, C), numbers.draw(B, C))
    given["kt"], given["vt"] = token
    dtypes = {"w": getattr(torch, case.w_dtype), "u": getattr(torch, case.u_dtype)}
    dtypes |= dict.fromkeys(("k", "v", "gy", "r", "kt", "vt"), dtype)
    lay_out = LAYOUTS.get(case.layout, lambda x: x)
    return {name: lay_out(x.to(dtypes.get(name, state_dtype), copy=True)) for name, x in given.items()}


# ---- outputs: one tree's process ----


def digest(tensor: Tensor) -> str:
    """Dtype, shape, strides, a hash of every bit but those of NaNs, and one of all bits.

    IEEE 754 leaves open the sign and payload of the NaN that two NaNs produce. On x86 they are those of the first
    operand, which the compiler chooses.
    """
    layout = f"{tensor.dtype}{list(tensor.shape)}{list(tensor.stride())}".removeprefix("torch.")
    has_nan = bool(tensor.isnan().any())
    one_nan = torch.where(tensor.isnan(), torch.full_like(tensor, NAN), tensor) if has_nan else tensor
    return " ".join((layout, *(_hash(x) for x in (one_nan, tensor))))


def _hash(tensor: Tensor) -> str:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _all_of(tensor: Tensor) -> Tensor:
    """The whole memory that a tensor is a view of."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _called(names: tuple[str, ...], operator: Any, *arguments: Any) -> dict[str, str]:
    """Digests of an operator's results, or that it refuses: the message may change between builds."""
    try:
        found = operator(*arguments)
    except (RuntimeError, ValueError, TypeError):
        return {names[0]: "refused"}
    found = found if isinstance(found, (tuple, list)) else (found,)
    return {name: digest(x) for name, x in zip(names, found, strict=True)}


FORWARD = ("y", "state_out", "checkpoints")
BACKWARD = ("gw", "gu", "gk", "gv", "gstate")


def _in_place(found: dict[str, str], what: str, operator: Any, arguments: tuple[Any, ...], state: Tensor) -> None:
    """A step: its result, the state with the memory around it, and whether its version, kept for autograd, moved."""
    before = state._version
    result = _called(("y",), operator, *arguments)
    found |= {f"{what}: {name}": value for name, value in result.items()}
    found[f"{what}: state and what lies around it"] = digest(_all_of(state))
    if state.numel() > 0 and result["y"] != "refused":
        found[f"{what}: state's version"] = "moved" if state._version > before else "UNMOVED"


def outputs_of(case: Case, numbers: Numbers) -> dict[str, str]:
    """Digests by name, of the inputs as well: before the calls, and after them, when they must be the same."""
    torch.set_num_threads(case.threads)
    ops = torch.ops.rwkv_kernels
    given = inputs_of(case, numbers)
    w, u, k, v, gy = (given[name] for name in ("w", "u", "k", "v", "gy"))
    state = None if case.state == "none" else given["state"]
    found = {f"input {name}": digest(x) for name, x in given.items()}
    for checkpoint in (False, True):
        forward = _called(FORWARD, ops.wkv_forward, w, u, k, v, state, checkpoint)
        found |= {f"forward, checkpoint={checkpoint}: {name}": value for name, value in forward.items()}
    checkpoints = ops.wkv_forward(w, u, k, v, state, True)[2]
    for what, gstate in (("zero", None), ("given", given["gstate"])):
        backward = _called(BACKWARD, ops._wkv_backward, w, u, k, v, state, checkpoints, gy, gstate)
        found |= {f"backward, gstate_out {what}: {name}": value for name, value in backward.items()}
    found |= {f"input {name} afterwards": digest(x) for name, x in given.items()}
    for what, r in (("step", None), ("step with r", given["r"])):
        _in_place(found, what, ops.wkv_step, (w, u, given["kt"], given["vt"], given["state"], r), given["state"])
    return found


def refusals() -> dict[str, str]:
    """The outcome of direct calls with arguments that do not fit, for each operator: they must touch nothing."""
    ops = torch.ops.rwkv_kernels
    numbers = Numbers()
    good = inputs_of(Case(2, 5, 4), numbers)
    bad = {
        "one channel more": lambda x: torch.cat((x, x[..., :1]), -1),
        "one row more": lambda x: torch.cat((x, x[:1])),
        "one axis more": lambda x: x[None],
        "one axis less": lambda x: x[0],
        "float64": lambda x: x.double(),
        "int64": lambda x: x.long(),
        "complex64": lambda x: x.to(torch.complex64),
    }
    calls: dict[str, tuple[Any, tuple[str, ...]]] = {
        "forward": (lambda *x: ops.wkv_forward(*x, True), ("w", "u", "k", "v", "state")),
        "step": (ops.wkv_step, ("w", "u", "kt", "vt", "state", "r")),
        "backward": (ops._wkv_backward, ("w", "u", "k", "v", "state", "checkpoints", "gy", "gstate")),
    }
    found: dict[str, str] = {}
    for (operation, (operator, names)), (what, change) in itertools.product(calls.items(), bad.items()):
        for changed in names:
            given = {name: x.clone() for name, x in good.items()}
            given["checkpoints"] = ops.wkv_forward(*(given[name] for name in ("w", "u", "k", "v", "state")), True)[2]
            given[changed] = change(given[changed])
            name = f"{operation} with {what} of {changed}"
            found |= {
                f"{name}: {part}": x for part, x in _called(_names(operation), operator, *_of(given, names)).items()
            }
            found[f"{name}: state afterwards"] = digest(given["state"])
    return found


def _names(operation: str) -> tuple[str, ...]:
    return {"forward": FORWARD, "backward": BACKWARD, "step": ("y",)}[operation]


def _of(given: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    return [given[name] for name in names]


def print_outputs(every: int) -> None:
    """Prints JSON: where this process's package lies, and digests by case and output."""
    import rwkv_kernels  # of the tree in PYTHONPATH

    torch.set_grad_enabled(False)
    numbers = Numbers()
    found = {str(case): outputs_of(case, numbers) for case in itertools.islice(cases(), 0, None, every)}
    found["refusals"] = refusals()
    where = str(Path(rwkv_kernels.__file__).resolve().parent.parent)
    info = rwkv_kernels.build_info()
    build = f"torch {torch.__version__}, {info.cpu_instruction_set}"
    json.dump({"where": where, "build": build, "outputs": found}, sys.stdout)


# ---- the comparison ----

Outputs = dict[str, dict[str, str]]


def outputs_of_tree(
    tree: Path, python: str = sys.executable, every: int = 1, environment: dict[str, str] | None = None
) -> Outputs:
    """The outputs of the package in a folder for every n-th case, from a separate process.

    Ends the program if the process fails or finds another package.
    """
    variables = {**os.environ, "PYTHONPATH": str(tree.resolve()), **(environment or {})}
    command = [python, str(Path(__file__).resolve()), PRINT, str(every)]
    result = subprocess.run(command, env=variables, cwd=tree, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"same outputs: {tree} fails\n{result.stderr}")
    found = json.loads(result.stdout)
    if Path(found["where"]) != tree.resolve():
        sys.exit(f"same outputs: expected the package in {tree}, got the one in {found['where']}")
    print(f"{tree}: {found['build']}, {sum(map(len, found['outputs'].values()))} outputs", flush=True)
    return found["outputs"]  # type: ignore[no-any-return]


def differences(one: Outputs, other: Outputs) -> Iterator[str]:
    """A sentence for each output that differs, and for a state that moved without autograd's knowledge."""
    for case in one.keys() | other.keys():
        a, b = one.get(case, {}), other.get(case, {})
        for name in sorted(a.keys() | b.keys()):
            if _numbers(a.get(name)) != _numbers(b.get(name)):
                yield f"{case}: {name}: {a.get(name)} and {b.get(name)}"
            elif a[name] == "UNMOVED":
                yield f"{case}: {name}: unmoved in both"


def _numbers(what: str | None) -> str | None:
    """A digest without the part that distinguishes NaNs."""
    return what.rpartition(" ")[0] if what is not None and " " in what else what


def differing_nans(one: Outputs, other: Outputs) -> int:
    """The number of outputs that differ only in the signs and payloads of NaNs."""
    pairs = ((a, other.get(case, {}).get(name, a)) for case, found in one.items() for name, a in found.items())
    return sum(a != b and _numbers(a) == _numbers(b) for a, b in pairs)


def main() -> None:
    """Compares, and fails where an output differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--python", default=sys.executable, help="of the other tree (default: this one)")
    arguments = parser.parse_args()
    one, other = outputs_of_tree(ROOT), outputs_of_tree(arguments.tree, arguments.python)
    found = sorted(differences(one, other))
    print(f"{len(one)} cases, {len(found)} outputs differ, {differing_nans(one, other)} in the signs of NaNs alone")
    if found:
        sys.exit("\n".join(found[:SHOWN]) + ("\n..." if len(found) > SHOWN else ""))


if __name__ == "__main__":
    if sys.argv[1:2] == [PRINT]:
        print_outputs(int(sys.argv[2]))
    else:
        main()
