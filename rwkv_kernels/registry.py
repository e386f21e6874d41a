"""The backends and the choice among them: explicit, and never a silent fallback."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, native, recomputation, reference, triton_backend

__all__ = ["BackendInfo", "BackendUnavailable", "backends", "use_backend"]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why and which can."""


class BackendInfo(NamedTuple):
    """A row of `backends()`: `reason` says why the backend is not available, and is None where it is."""

    name: str
    available: bool
    reason: str | None


Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to compute the operator.

    `device_types` are those of the tensors that it takes, None for all of them. `why_unavailable` speaks of this
    machine and build, `why_not` of one call, known by its k, which is on such a device. `forward` and `step` take
    arguments that were checked.
    """

    name: str
    device_types: tuple[str, ...] | None
    why_unavailable: Callable[[], str | None]
    why_not: Callable[[Tensor], str | None]
    forward: Forward
    step: Step


def step_by_forward(
    forward: Forward, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None
) -> Tensor:
    """A step as a sequence of one token, whose only mutation is a copy to the state."""
    # In the dtype of the sums, so that the gated result is rounded once.
    wide_k, wide_v = (x.unsqueeze(1).to(state.dtype) for x in (k, v))
    y, state_out = forward(w, u, wide_k, wide_v, state)
    state.copy_(state_out)
    y = y.squeeze(1)
    return (y if r is None else torch.sigmoid(r.to(state.dtype)) * y).to(k.dtype)


REFERENCE = Backend(
    "reference", None, lambda: None, lambda k: None, reference.wkv, functools.partial(step_by_forward, reference.wkv)
)


def _constant(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """Asks once per argument, and lets torch.compile do the same while it traces."""
    cached = functools.cache(function)

    def ask(*arguments: int) -> str | None:
        return cached(*arguments)

    # What torch.compiler.assume_constant_result does, which would import the compiler.
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    ask.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return ask


@_constant
def _cuda_why_unavailable() -> str | None:
    if native.cuda.why_missing is not None:
        return native.cuda.why_missing
    if not torch.cuda.is_available():
        return f"torch for CUDA {torch.version.cuda} finds no usable GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def _covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture such as "9.0", or with its PTX "9.0+PTX", runs on a GPU."""
    major, minor = (int(part) for part in architecture.removesuffix("+PTX").split("."))
    return (major == capability[0] and minor <= capability[1]) or (
        architecture.endswith("+PTX") and (major, minor) <= capability
    )


@_constant
def _why_uncovered(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    built = native.cuda.info["cuda_architectures"]
    if any(_covers(architecture, capability) for architecture in built):
        return None
    number = f"{capability[0]}.{capability[1]}"
    return (
        f"cuda:{index} has compute capability {number}, and this build is for {', '.join(built)}: rebuild with "
        f"TORCH_CUDA_ARCH_LIST={number}"
    )


def _cuda_why_not(k: Tensor) -> str | None:
    return _cuda_why_unavailable() or _why_uncovered(k.device.index)


# Registrations last as long as this object.
_library = torch.library.Library(native.NAMESPACE, "FRAGMENT")


def _compiled() -> tuple[Forward, Step]:
    if native.operators.why_missing is not None:

        def missing(*_: Tensor | None) -> Any:
            raise BackendUnavailable(native.operators.why_missing)

        return missing, missing

    intervals = {getattr(torch, name): steps for name, steps in native.operators.info["checkpoint_intervals"].items()}
    ops = getattr(torch.ops, native.NAMESPACE)
    forward = autograd.attach(_library, ops.wkv_forward.default, ops._wkv_backward.default, intervals.__getitem__)

    torch.library.register_fake(f"{native.NAMESPACE}::wkv_step", autograd.fake_step, lib=_library)
    return forward, ops.wkv_step.default


# Kernels of the same operators: torch takes those of the arguments' device.
_forward, _step = _compiled()
CUDA = Backend("cuda", ("cuda",), _cuda_why_unavailable, _cuda_why_not, _forward, _step)
TRITON = Backend(
    "triton",
    (triton_backend.DEVICE,),
    triton_backend.why_unavailable,
    triton_backend.why_not,
    *triton_backend.attach(_library),
)
# Meta tensors have no data, so the operator's fake kernel serves them.
CPU = Backend("cpu", ("cpu", "meta"), lambda: native.operators.why_missing, lambda k: None, _forward, _step)

BACKENDS = {backend.name: backend for backend in (CUDA, TRITON, CPU, REFERENCE)}

# "auto" takes the first that can. The oracle is not among them, nor is Triton's interpreter: they are orders of
# magnitude slower, so they must be asked for by name.
AUTOMATIC = ("cuda", "cpu") if triton_backend.INTERPRETED else ("cuda", "triton", "cpu")


DEFAULT = os.environ.get("RWKV_KERNELS_BACKEND", "auto")


class _Choice(threading.local):
    name = DEFAULT
    # Where the block of use_backend was opened that made the choice; None without one.
    region: recomputation.Region | None = None


_choice = _Choice()


def _chosen() -> str:
    """What "auto" means here."""
    if _choice.region is None or torch.compiler.is_compiling():
        return _choice.name
    region = recomputation.current()
    if region.recomputation is not None and region != _choice.region:
        return DEFAULT  # the forward was in no block, or a block like its own would have been opened in the region
    if region.forward is not None and region != _choice.region:
        recomputation.repeat_under(functools.partial(use_backend, _choice.name), region)
    return _choice.name


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"wkv backend {name!r} is unknown. Known: auto, {', '.join(BACKENDS)}.")


def _takes(backend: Backend, k: Tensor) -> bool:
    return backend.device_types is None or k.device.type in backend.device_types


def _can(backend: Backend, k: Tensor) -> bool:
    # In this order, so that no call on the CPU makes torch look for GPUs, which would break processes that fork later.
    return _takes(backend, k) and backend.why_not(k) is None and backend.why_unavailable() is None


def _why_not(backend: Backend, k: Tensor) -> str | None:
    if not _takes(backend, k):
        elsewhere = f"k is on {k.device}, and this backend takes tensors on {' or '.join(backend.device_types or ())}"
        return backend.why_unavailable() or elsewhere
    return backend.why_unavailable() or backend.why_not(k)


def select(name: str, k: Tensor) -> Backend:
    """The backend for a call with this k; raises ValueError for an unknown name, BackendUnavailable for a refusal."""
    if name == "auto":
        name = _chosen()
    _check_name(name)
    for candidate in AUTOMATIC if name == "auto" else (name,):
        backend = BACKENDS[candidate]
        if _can(backend, k):
            if backend is not REFERENCE:
                autograd.refuse_onnx()
            return backend
    raise _refusal(name, k)


def _refusal(name: str, k: Tensor) -> BackendUnavailable:
    asked = AUTOMATIC if name == "auto" else (name,)
    reasons = "; ".join(f"{candidate}: {_why_not(BACKENDS[candidate], k)}" for candidate in asked)
    can = [backend.name for backend in BACKENDS.values() if _can(backend, k)]
    return BackendUnavailable(f"wkv backend {name!r} refused ({reasons}). Available for this call: {', '.join(can)}.")


def backends() -> list[BackendInfo]:
    """Every backend, whether this machine and build can use it, and if not, why not."""
    reasons = [(backend.name, backend.why_unavailable()) for backend in BACKENDS.values()]
    return [BackendInfo(name, reason is None, reason) for name, reason in reasons]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Changes what backend="auto" means inside the block, in this thread; "auto" restores the automatic choice.

    What torch.utils.checkpoint recomputes takes the backend of its forward, in any thread and after the block, except
    with use_reentrant=True, which recomputes with what "auto" means at that time. (A function that opens a block itself
    does so again.)

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
