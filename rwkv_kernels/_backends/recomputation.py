"""Which region of torch.utils.checkpoint a call stands in, so that its recomputation takes the backend of its forward.

Without reentrant autograd, torch runs a checkpointed function again when backward asks for a tensor that was not kept:
in another thread on a GPU, and maybe after the end of the block of `use_backend` that the function ran in. Tensors that
another backend saves would not fit. torch restores autocast and random numbers for this and has no place for more, so
the function that it will run again is wrapped where it lies. In a torch that has it elsewhere no region is found, and
a recomputation by another backend is torch's CheckpointError.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint

__all__ = ["Region", "current", "repeat_under"]


class Region(NamedTuple):
    """The innermost checkpointed function that runs, for the first time or again; both None outside of any."""

    forward: Any = None
    recomputation: Any = None


class _Repeated:
    """The function that a frame runs again, in the context that it first ran in."""

    def __init__(self, function: Callable[..., None], context: Callable[[], AbstractContextManager[None]]) -> None:
        self.function, self.context = function, context

    def __call__(self, *arguments: Any) -> None:
        with self.context():
            self.function(*arguments)


def current() -> Region:
    """The region that a call stands in, by the hooks that the region has set for saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = None if hooks is None else inspect.unwrap(hooks[0])
    if not inspect.isfunction(pack):
        return Region()
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    frame_type = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())
    if "frame" in cells and isinstance(frame := cells["frame"].cell_contents, frame_type):
        return Region(forward=frame)
    if "target_frame_ref" in cells and isinstance(frame := cells["target_frame_ref"].cell_contents(), frame_type):
        return Region(recomputation=frame)
    return Region()


def repeat_under(context: Callable[[], AbstractContextManager[None]], region: Region) -> None:
    """Has the region's function run in this context when it runs again."""
    frame = region.forward
    if not isinstance(frame.recompute_fn, _Repeated):
        frame.recompute_fn = _Repeated(frame.recompute_fn, context)
