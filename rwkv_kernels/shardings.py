"""How the operators run on DTensors: on parts of the batch, on parts of the channels, or whole on every device.

`register` tells torch so. Its interface for this is experimental and takes a second to import, so that nothing is told
before a DTensor arrives at `wkv`, or the user asks for it: `rwkv_kernels.distributed.register_shardings`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import native

__all__ = ["prepare", "register"]

# The kinds of tensors by their names in the schemas.
KINDS = {
    **dict.fromkeys(("w", "log_decay", "u"), "parameter"),
    **dict.fromkeys(("gw", "g_log_decay", "gu"), "parameter's gradient"),
    **dict.fromkeys(("k", "v", "r", "y", "gk", "gv", "gr", "gy"), "sequence"),
    **dict.fromkeys(("state", "state_out", "gstate", "gstate_out"), "state"),
    "checkpoints": "checkpoints",
    "cu_seqlens": "boundaries",
}
# The dimension of each kind that a layout cuts, over one dimension of a mesh; others are whole on every device.
LAYOUTS: dict[str, dict[str, int]] = {
    "replicated": {},
    "batch": {"sequence": 0, "state": 0, "checkpoints": 0},
    "channels": {
        "parameter": 0,
        "parameter's gradient": 0,
        "sequence": -1,
        "state": 2,
        "checkpoints": 3,
    },
}


def prepare(k: Tensor) -> None:
    """Registers the shardings if k is a DTensor; for any k that is not of torch's own type."""
    # Only its users have it imported.
    if "torch.distributed.tensor" in sys.modules and hasattr(k, "placements"):
        register()


@functools.cache
def register() -> None:
    """Registers the shardings of every operator; again does nothing. Raises ImportError without torch.distributed."""
    from torch.distributed.tensor.experimental import register_sharding

    namespace = getattr(torch.ops, native.NAMESPACE)
    for prefix in ("wkv", "triton", "bi_wkv", "triton_bi"):
        for name in ("_forward", "_mixing_forward", "_backward", "_mixing_backward", "_step"):
            full = f"{'_' * name.endswith('backward')}{prefix}{name}"
            if hasattr(namespace, full):
                operator = getattr(namespace, full).default
                register_sharding(operator)(_strategy(operator, _step_rows if name == "_step" else _rows))


# torch.compile runs it while it traces, as if it was torch.compiler.assume_constant_result, which imports the compiler.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]

Row = tuple[list[Any], list[Any]]  # the placements of the results, and of the arguments; None for what is no tensor
Rows = Callable[[OpOverload, dict[str, Any]], list[Row]]


def _strategy(operator: OpOverload, rows: Rows) -> Callable[..., list[Row]]:
    names = [argument.name for argument in operator._schema.arguments]

    def strategy(*arguments: Any) -> list[Row]:
        given = dict.fromkeys(names) | dict(zip(names, arguments, strict=False))
        # Defaults that a call left out are no arguments to torch either.
        return [(results, taken[: len(arguments)]) for results, taken in rows(operator, given)]

    return strategy


def _placement(layout: str, name: str, dimensions: int) -> Any:
    """Of the tensor of that name, where a dimension of the mesh has that layout."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    kind = KINDS[name]
    if layout == "batch" and kind == "parameter's gradient":
        return Partial()
    cut = LAYOUTS[layout].get(kind)
    return Replicate() if cut is None else Shard(cut % dimensions)


def _row(operator: OpOverload, given: dict[str, Any], layout: str) -> Row:
    dimensions = {"parameter": 1, "parameter's gradient": 1, "state": 3, "checkpoints": 4, "boundaries": 1}

    def placed(name: str) -> Any:
        return _placement(layout, name, dimensions.get(KINDS[name], len(given["k"].shape)))

    taken = [placed(name) if hasattr(x, "placements") else None for name, x in given.items()]
    return [placed(result.name) for result in operator._schema.returns], taken


def _rows(operator: OpOverload, given: dict[str, Any]) -> list[Row]:
    """Every layout; torch takes the one that moves the least."""
    from torch.distributed.tensor import Shard

    for name in ("k", "v", "r"):
        if (x := given.get(name)) is not None and any(isinstance(p, Shard) and p.dim == 1 for p in x.placements):
            raise ValueError(
                f"{name}: expected every device to have all steps, got {x.placements}: time is cut by "
                "rwkv_kernels.distributed.wkv, which takes each rank's own steps"
            )
    packed = given.get("cu_seqlens") is not None
    return [_row(operator, given, layout) for layout in LAYOUTS if not (packed and layout == "batch")]


def _step_rows(operator: OpOverload, given: dict[str, Any]) -> list[Row]:
    """The layouts of the state, which moves on where it is.

    A strategy that moved the state to other devices would leave the given one behind. So all tensors must be placed as
    the state needs them: torch then finds a strategy that moves nothing, and among equals takes the first, which is
    that one, because the others cut what is whole.
    """
    state = given["state"]
    names = [name for name, x in given.items() if hasattr(x, "placements")]
    layouts = []
    for dimension, found in enumerate(state.placements):
        layout = next((name for name in LAYOUTS if _placement(name, "state", 3) == found), None)
        if layout is None:
            raise ValueError(f"state: expected it replicated or cut over B or C, got {state.placements}")
        layouts.append(layout)
        for name in names:
            expected = _placement(layout, name, 1 if KINDS[name] == "parameter" else 3 if name == "state" else 2)
            if given[name].placements[dimension] != expected:
                raise ValueError(
                    f"{name}: expected {expected} in dimension {dimension} of the mesh, because wkv_step leaves the "
                    f"state where it is, {state.placements}; got {given[name].placements}"
                )
    return [_row(operator, given, layout) for layout in LAYOUTS if layout in layouts]
