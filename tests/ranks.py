"""Functions that run on several ranks: processes of this machine over gloo, or threads of this process."""

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# Ranks are forked from a server that has imported what takes seconds. It has no threads, and neither have they.
multiprocessing.set_forkserver_preload(
    ["torch", "torch.distributed.tensor.experimental", "rwkv_kernels.distributed", "problems", "models"]
)


def _rank(rank: int, function: Callable[..., None], ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    function(*arguments)
    # A rank that is done must not leave those that wait for it.
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Runs a function of a module on each of so many processes; fails as soon as one does, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (function, ranks, folder, arguments), nprocs=ranks, start_method="forkserver"
        )


def gathered(x: Any) -> list[Any]:
    """Every rank's x."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts


def error_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The error of a call with its type, or nothing."""
    try:
        function(*arguments, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
