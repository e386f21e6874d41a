"""The ranks that hold consecutive slices of the same sequences, and what they tell one another before they compute.

Owns the process group, the agreement on what a call is about, and the one collective that is used, an all-gather; knows
nothing of the operator. Public functions of torch.distributed alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..inputs import DTYPES

__all__ = ["Group", "Ranks", "Slices", "refuse_subclasses"]

Group = dist.ProcessGroup | DeviceMesh | None

# Renamed in torch 2.13.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# The facts of a call that a rank tells the others, each an int64: those of AGREED must be the same everywhere.
AGREED = ("function", "B", "C", "dtype", "return_state")
FUNCTIONS = ("wkv", "token_shift", "RWKV")
FITS, STEPS, GRADIENT = len(AGREED), len(AGREED) + 1, len(AGREED) + 2
WITHOUT_GRADIENTS, WANTS_NONE, WANTS_GRADIENTS = range(3)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _compare(name: str, values: Sequence[object]) -> None:
    """Raises ValueError unless all ranks say the same."""
    if len(found := sorted(set(values), key=values.index)) > 1:
        said = "; ".join(f"{x} on {_named([i for i, value in enumerate(values) if value == x])}" for x in found)
        raise ValueError(f"{name}: expected the same on every rank of the group, got {said}")


@dataclass(frozen=True, eq=False)  # a leaf to torch, which would change tensors inside of a tuple
class Slices:
    """The slices that the ranks agreed on: rank i has the steps that follow those of rank i - 1.

    Attributes:
        group: Theirs.
        rank: This process's place among them.
        steps: How many steps each rank has; 0 is allowed.
        anchor: A tensor that requires a gradient where any rank's inputs do, else None. An argument of every function
            whose backward is a collective, so that it runs on all ranks or none.
    """

    group: dist.ProcessGroup
    rank: int
    steps: tuple[int, ...]
    anchor: Tensor | None

    @property
    def is_first(self) -> bool:
        """Whether no rank is before this one."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether no rank comes after this one."""
        return self.rank == len(self.steps) - 1

    def all_gather(self, x: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """Starts to collect x of every rank into [ranks, *x.shape], complete after the function that comes with it."""
        return _all_gather(x, self.group, len(self.steps))


def _all_gather(x: Tensor, group: dist.ProcessGroup, ranks: int) -> tuple[Tensor, Callable[[], object]]:
    x = x.contiguous()
    gathered = x.new_empty((ranks, *x.shape))
    work = _ALL_GATHER(gathered.view(-1), x.view(-1), group=group, async_op=True)
    return gathered, work.wait


class Ranks(NamedTuple):
    """A process group, and this process's place in it."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @staticmethod
    def of(group: Group) -> "Ranks":
        """The group's, by default all processes'; raises RuntimeError without one, ValueError outside of it."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group: expected a process group, got none: call torch.distributed.init_process_group first, in "
                "processes that torchrun started"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group: expected a mesh of one dimension, got {group.ndim}: take mesh['context']")
            group = group.get_group()
        chosen = dist.group.WORLD if group is None else group
        if not isinstance(chosen, dist.ProcessGroup):
            raise ValueError(f"group: expected a process group that this process is in, got {chosen!r}")
        return Ranks(chosen, dist.get_rank(chosen), dist.get_world_size(chosen))

    def agree(
        self,
        function: str,
        x: Tensor,
        differentiable: Sequence[Tensor | None],
        return_state: bool = False,
        misfit: Exception | None = None,
    ) -> Slices:
        """The slices of x [B, T, C] on all ranks.

        One all-gather of 64 bytes a rank comes before everything else, because collectives of tensors that differ in
        size hang or crash. A rank whose own arguments do not fit takes part as well, and passes its error as `misfit`.

        Raises:
            ValueError: the ranks disagree, on every rank; the message names them.
            RuntimeError: other ranks' arguments do not fit. On those, `misfit` itself is raised.
        """
        facts = [0] * (len(AGREED) + 3)
        if misfit is None:
            gradient = WITHOUT_GRADIENTS
            if torch.is_grad_enabled():
                wanted = any(tensor is not None and tensor.requires_grad for tensor in differentiable)
                gradient = WANTS_GRADIENTS if wanted else WANTS_NONE
            B, T, C = x.shape
            facts = [FUNCTIONS.index(function), B, C, DTYPES.index(x.dtype), return_state, 1, T, gradient]
        told, wait = _all_gather(torch.tensor(facts, device=self._device()), self.group, self.size)
        wait()
        rows: list[list[int]] = told.tolist()
        if misfit is not None:
            raise misfit
        if misfits := [rank for rank, row in enumerate(rows) if not row[FITS]]:
            raise RuntimeError(f"{_named(misfits)} refused their arguments, and so this rank's call failed")
        meanings: dict[str, Sequence[object]] = {
            "function": FUNCTIONS,
            "dtype": DTYPES,
            "return_state": (False, True),
        }
        for i, name in enumerate(AGREED):
            _compare(name, [meanings[name][row[i]] if name in meanings else row[i] for row in rows])
        gradients = [row[GRADIENT] for row in rows]
        if wants := WANTS_GRADIENTS in gradients:
            _compare("torch.is_grad_enabled()", [gradient != WITHOUT_GRADIENTS for gradient in gradients])
        anchor = torch.zeros((), device=x.device, requires_grad=True) if wants else None
        return Slices(self.group, self.rank, tuple(row[STEPS] for row in rows), anchor)

    def _device(self) -> torch.device:
        """The processor's, where the group has a backend for it: reading from a GPU would wait for its work."""
        if "cpu" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cpu") if accelerator is None else accelerator


def refuse_subclasses(**tensors: Tensor | None) -> None:
    """Raises TypeError for a DTensor and its like, whose parts on other ranks nobody here would ask for."""
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter, type(None)):
            raise TypeError(f"{name}: expected a torch.Tensor, this rank's part, got {type(tensor).__name__}")
