"""A problem of a given size, and the check that a backend solves it, which comes before its timing."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import rwkv_kernels

Shape = tuple[int, int, int]  # B, T, C
Function = Callable[..., Tensor]  # (w, u, k, v) -> y, of a gated problem (w, u, k, v, r) -> y

NAMES = ("y", "gw", "gu", "gk", "gv", "gr")
LONGEST_FOR_THE_ORACLE = 4096  # steps, some 0.2 ms each


def function_of(backend: str) -> Function:
    """The operator by a backend, gated if it is given r."""
    return lambda w, u, k, v, r=None: rwkv_kernels.wkv(w, u, k, v, r=r, backend=backend)


def name_of(dtype: torch.dtype) -> str:
    """As records have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def written(shape: Shape) -> str:
    """As records have it, such as "8, 1024, 768"."""
    return ", ".join(map(str, shape))


class Problem:
    """Inputs of the operator on torch's default device, y of a function of them, and the gradients of Σ y·gy.

    Args:
        shape: Of k, v and gy.
        dtype: Of k, v and gy.
        gated: Whether there is an r.
        exact: Gives the y that is right, of inputs in float64 on the CPU; by default the oracle, or where that would
            take minutes the CPU's kernel, which the tests compare with it.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, gated: bool = False, exact: Function | None = None) -> None:
        C = shape[-1]
        self.exact = exact or function_of("reference" if shape[1] <= LONGEST_FOR_THE_ORACLE else "cpu")
        torch.manual_seed(0)
        # Decays from e^-0.0001 to e^-8 per step: those of a trained model and beyond.
        self.w, self.u = torch.linspace(-9, 2, C).requires_grad_(), torch.randn(C).requires_grad_()
        self.k, self.v, self.gy = (torch.randn(shape, dtype=dtype) for _ in range(3))
        self.k.requires_grad_()
        self.v.requires_grad_()
        self.r = torch.randn(shape, dtype=dtype, requires_grad=True) if gated else None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that gradients are taken of: w, u, k, v, and r if there is one."""
        plain = self.w, self.u, self.k, self.v
        return plain if self.r is None else (*plain, self.r)

    def forward(self, function: Function) -> Tensor:
        """The output, where no gradient is requested."""
        with torch.no_grad():
            return function(*self.leaves)

    def prepare_backward(self, function: Function) -> Callable[[], tuple[Tensor, ...]]:
        """Runs forward once; the result runs backward as often as it is called."""
        y = function(*self.leaves)
        return lambda: torch.autograd.grad(y, self.leaves, self.gy, retain_graph=True)

    def forward_and_backward(self, function: Function) -> tuple[Tensor, ...]:
        """The output and the gradients of the leaves."""
        y = function(*self.leaves)
        return y.detach(), *torch.autograd.grad(y, self.leaves, self.gy)

    def _channels(self, x: Tensor) -> Tensor:
        """Three channels in float64: channels are independent, and all would take the CPU too long."""
        C = self.k.shape[-1]
        channels = torch.tensor(sorted({0, C // 2, C - 1}), device=x.device)
        return x.detach().index_select(-1, channels).double().cpu()

    @functools.cached_property
    def _expected(self) -> tuple[Tensor, ...]:
        given = [self._channels(x).requires_grad_() for x in self.leaves]
        y = self.exact(*given)
        # A single step does not depend on w.
        gradients = torch.autograd.grad(y, given, self._channels(self.gy), materialize_grads=True)
        return y.detach(), *gradients

    def error(self, function: Function) -> float:
        """The worst error of y and gradients in three channels against float64, relative to the largest element."""
        found = [self._channels(x) for x in self.forward_and_backward(function)]
        # Sums over the batch and time cancel, and are rounded relative to their terms.
        terms = float(self._channels(self.gy).abs().max() * self._channels(self.v).abs().max())
        errors = []
        for name, a, b in zip(NAMES[: len(found)], found, self._expected, strict=True):
            scale = max(float(b.abs().max()), 0.0 if name == "y" else terms)
            errors.append((a - b).abs().max() / scale)
        return float(torch.stack(errors).max())  # which is NaN if one of them is

    def check(self, function: Function) -> float:
        """The error; raises AssertionError where it exceeds what rounding explains."""
        error = self.error(function)
        allowed = torch.finfo(self.k.dtype).eps + 100 * torch.finfo(torch.float32).eps * self.k.shape[1] ** 0.5
        assert error <= allowed, f"off by {error:.1e} of the largest element, allowed {allowed:.1e}"
        return error
