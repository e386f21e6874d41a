"""The backends and the choice among them: explicit, and never a silent fallback."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import DTYPES, either
from . import recomputation

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendInfo",
    "BackendUnavailable",
    "backends",
    "constant",
    "register",
    "select",
    "use_backend",
]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why and which can."""


class BackendInfo(NamedTuple):
    """A row of `backends()`: `reason` says why the backend is not available, and is None where it is."""

    name: str
    available: bool
    reason: str | None


Forward = Callable[..., tuple[Tensor, Tensor]]  # (w, u, k, v, state, r, cu_seqlens) -> (y, state_out)
Step = Callable[..., Tensor]  # (w, u, k, v, state, r) -> y, and the state in place
BiForward = Callable[..., Tensor]  # (log_decay, u, k, v, r, cu_seqlens) -> y


@dataclass(frozen=True)
class Backend:
    """A way to compute the operators; its functions get arguments that `functional` has checked.

    Args:
        name: Of the argument `backend`.
        forward: (w, u, k, v, state or None, r or None, cu_seqlens or None) -> (y, state_out), differentiable.
        step: (w, u, k, v, state, r or None) -> y, which moves the state in place; None computes it by `forward`.
        bi_forward: (log_decay, u, k, v, r or None, cu_seqlens or None) -> y of `bi_wkv`, differentiable; None where the
            backend has no bidirectional operator, and refuses it.
        device_types: Of the tensors that it takes, the usual one first; None for all.
        dtypes: Of the k that it takes.
        automatic: Whether "auto" may choose it.
        why_unavailable: () -> what this machine or build lacks, or None.
        why_not: (k) -> why it refuses a call with this k, of its devices and dtypes, or None.
    """

    name: str
    forward: Forward
    step: Step | None = None
    bi_forward: BiForward | None = None
    device_types: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    automatic: bool = False
    why_unavailable: Callable[[], str | None] = lambda: None
    why_not: Callable[[Tensor], str | None] = lambda k: None

    @property
    def device_type(self) -> str:
        """The usual device of its tensors."""
        return self.device_types[0] if self.device_types else "cpu"

    def why_elsewhere(self, k: Tensor) -> str | None:
        """Why k is not of its devices and dtypes, or None."""
        if self.device_types is not None and k.device.type not in self.device_types:
            return f"k is on {k.device}, and this backend takes tensors on {' or '.join(self.device_types)}"
        if k.dtype not in self.dtypes:
            return f"k is {k.dtype}, and this backend takes {either(self.dtypes)}"
        return None


BACKENDS: dict[str, Backend] = {}
AUTOMATIC: list[str] = []  # in the order in which "auto" asks them


def register(backend: Backend) -> None:
    """Adds a backend, behind those that are there."""
    BACKENDS[backend.name] = backend
    if backend.automatic:
        AUTOMATIC.append(backend.name)


def constant(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """Asks once per argument, and lets torch.compile do the same while it traces."""
    cached = functools.cache(function)

    def ask(*arguments: int) -> str | None:
        return cached(*arguments)

    # As torch.compiler.assume_constant_result, which would import the compiler.
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    ask.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return ask


DEFAULT = os.environ.get("RWKV_KERNELS_BACKEND", "auto")


class _Choice(threading.local):
    name = DEFAULT
    # Where the block of use_backend was opened that made the choice; None without one.
    region: recomputation.Region | None = None


_choice = _Choice()


def _chosen() -> str:
    """The meaning of "auto" here."""
    if torch.compiler.is_compiling():
        return _choice.name
    region = recomputation.current()
    if region.recomputation is not None and region != _choice.region:
        return DEFAULT  # a block like that of the forward would have been opened in the region
    if region.forward is not None and region != _choice.region:
        recomputation.repeat_under(functools.partial(use_backend, _choice.name), region)
    return _choice.name


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"wkv backend {name!r} is unknown. Known: auto, {', '.join(BACKENDS)}.")


def _lacks(backend: Backend, function: str) -> str | None:
    return f"this backend has no {function}" if function == "bi_wkv" and backend.bi_forward is None else None


def _can(backend: Backend, k: Tensor, function: str) -> bool:
    # In this order, so that no call on the CPU makes torch look for GPUs, which would break processes that fork later.
    return (
        (backend.device_types is None or k.device.type in backend.device_types)
        and k.dtype in backend.dtypes
        and _lacks(backend, function) is None
        and backend.why_not(k) is None
        and backend.why_unavailable() is None
    )


def _why_not(backend: Backend, k: Tensor, function: str) -> str | None:
    reason = backend.why_unavailable() or backend.why_elsewhere(k) or _lacks(backend, function)
    return reason or backend.why_not(k)


def select(name: str, k: Tensor, function: str = "wkv") -> Backend:
    """The backend for a call of `function`, wkv or bi_wkv, with this k.

    Raises ValueError for an unknown name, BackendUnavailable for a refusal.
    """
    if name == "auto":
        name = _chosen()
    _check_name(name)
    candidates = AUTOMATIC if name == "auto" else (name,)
    for candidate in candidates:
        if _can(backend := BACKENDS[candidate], k, function):
            return backend
    reasons = "; ".join(f"{each}: {_why_not(BACKENDS[each], k, function)}" for each in candidates)
    can = [backend.name for backend in BACKENDS.values() if _can(backend, k, function)]
    raise BackendUnavailable(
        f"{function} backend {name!r} refused ({reasons}). Available for this call: {', '.join(can)}."
    )


def backends() -> list[BackendInfo]:
    """Every backend, whether this machine and build can use it, and if not, why not."""
    reasons = [(backend.name, backend.why_unavailable()) for backend in BACKENDS.values()]
    return [BackendInfo(name, reason is None, reason) for name, reason in reasons]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Changes what backend="auto" means inside the block, in this thread; "auto" restores the automatic choice.

    What torch.utils.checkpoint recomputes takes the backend of its forward, in any thread and after the block, except
    with use_reentrant=True, which recomputes with what "auto" means at that time: if that is another backend, gradients
    of a returned state are wrong, as they belong to a state with the max of the first one. (A function that opens a
    block itself does so again.)

    The environment variable RWKV_KERNELS_BACKEND, read when the package is imported, does the same for the process.
    Raises ValueError for an unknown name at once; whether the backend can run is asked by each call.
    """
    _check_name(name)
    before = _choice.name, _choice.region
    region = recomputation.Region() if torch.compiler.is_compiling() else recomputation.current()
    _choice.name, _choice.region = name, region
    try:
        yield
    finally:
        _choice.name, _choice.region = before
