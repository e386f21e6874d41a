"""Problems for the bidirectional operator as data, their exact solutions, and their tolerance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import problems
import torch
from problems import INTERVAL, Problem, assert_tensor_close
from torch import Tensor

import rwkv_kernels
from rwkv_kernels import reference
from rwkv_kernels.reference import state_dtype

# log_decay is that of every channel; None is drawn around -e^-1, and EITHER_SIGN goes evenly from -20 to 0.05.
EITHER_SIGN = math.nan
PROBLEMS = {
    "small": Problem(),
    "one_step": Problem(T=1),
    "two_steps": Problem(T=2),
    "one_of_everything": Problem(B=1, T=1, C=1),
    "one_channel": Problem(B=1, T=600, C=1),
    "below_a_subchunk": Problem(T=15),
    "a_subchunk": Problem(T=16, C=64),
    "above_a_subchunk": Problem(T=17, C=64),
    "below_an_interval": Problem(T=INTERVAL - 1, C=33),
    "an_interval": Problem(T=INTERVAL, C=33),
    "above_an_interval": Problem(T=INTERVAL + 1, C=33),
    "two_intervals_and_one": Problem(T=2 * INTERVAL + 1, C=16, log_decay=EITHER_SIGN),
    "an_image_of_14_by_14": Problem(T=196, C=48, log_decay=EITHER_SIGN),
    "wide": Problem(B=1, T=40, C=200),
    "many_sequences": Problem(B=9, T=20, C=5),
    "no_decay": Problem(T=150, log_decay=0.0),
    "slow_decay": Problem(T=300, log_decay=-1e-3),
    "strong_decay": Problem(T=100, log_decay=-20.0),
    "growing_slowly": Problem(T=300, log_decay=1e-3),
    "growing": Problem(T=300, log_decay=0.05),
    "growing_fast": Problem(T=100, log_decay=3.0),
    "growing_at_once": Problem(T=70, log_decay=50.0),
    "u_of_plus_50": Problem(T=80, u=50.0),
    "u_of_minus_50": Problem(T=80, u=-50.0, log_decay=EITHER_SIGN),
    "u_of_plus_1000": Problem(u=1000.0),
    "u_of_minus_1000": Problem(u=-1000.0),
    "k_of_20": Problem(T=130, k_scale=20.0, log_decay=EITHER_SIGN),
    "k_of_20_and_u_of_plus_25": Problem(T=80, k_scale=20.0, u=25.0),
    "k_of_20_and_u_of_minus_25": Problem(T=80, k_scale=20.0, u=-25.0),
    "k_of_1000": Problem(T=130, k_scale=1000.0, log_decay=EITHER_SIGN),
    "k_of_10000": Problem(T=70, k_scale=1e4),
    "transposed": Problem(T=70, layout="transposed"),
    "time_major": Problem(T=70, C=32, layout="time_major"),
    "every_second_channel": Problem(layout="every_second_channel"),
    "expanded": Problem(layout="expanded"),
    "gated": Problem(T=70, gated=True),
    "gated_wide": Problem(B=1, T=130, C=200, gated=True, log_decay=EITHER_SIGN),
    "gated_k_of_20": Problem(T=130, k_scale=20.0, gated=True),
    "gated_time_major": Problem(T=70, C=32, layout="time_major", gated=True),
    "packed": Problem(lengths=(7, 30, 12)),
    "packed_of_all_lengths": Problem(C=33, lengths=problems.ALL_LENGTHS, log_decay=EITHER_SIGN),
    "packed_many_tiny": Problem(C=66, lengths=(1, 2, 1, 1, 3, 1, 0, 1) * 12),
    "packed_k_of_20": Problem(k_scale=20.0, lengths=(90, 1, 40)),
    "packed_time_major": Problem(C=32, lengths=(20, 50), layout="time_major"),
    "gated_and_packed": Problem(C=66, lengths=(7, 130, 12), gated=True, log_decay=EITHER_SIGN),
}
LONG_PROBLEMS = {
    "decay_of_0.001": Problem(B=1, T=4096, C=6, log_decay=-1e-3),
    "growth_of_0.001": Problem(B=1, T=4096, C=6, log_decay=1e-3),
    "no_decay": Problem(B=1, T=4096, C=6, log_decay=0.0),
}


@dataclass
class Tensors:
    """The tensors of the operator (log_decay, u, k, v, r, cu_seqlens), and gy."""

    log_decay: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    gy: Tensor
    r: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Without those that may be absent."""
        return self.log_decay, self.u, self.k, self.v

    @property
    def options(self) -> dict[str, Tensor | None]:
        """The other arguments of `bi_wkv`."""
        return {"r": self.r, "cu_seqlens": self.cu_seqlens}

    @property
    def steps(self) -> int:
        """Of the longest sequence."""
        return self.k.shape[1] if self.cu_seqlens is None else int(self.cu_seqlens.diff().max())

    def exact(self) -> "Tensors":
        """The same numbers in float64."""
        return self.changed(lambda x: x.double() if x.is_floating_point() else x)

    def widest(self, backend: str) -> "Tensors":
        """In the widest dtype of the backend, for claims that are exact except for rounding."""
        return self.exact() if problems.widest_dtype(backend) == torch.float64 else self

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Tensors":
        """The same, with the function applied to every tensor."""
        return replace(self, **{name: change(x) for name, x in vars(self).items() if x is not None})

    def leaves(self) -> dict[str, Tensor]:
        """Those that have a gradient, anew, by name."""
        given = {name: getattr(self, name) for name in ("log_decay", "u", "k", "v", "r")}
        return {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}


def make(problem: Problem, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """The problem's tensors, on torch's default device."""
    drawn = problems.make(replace(problem, log_decay=None), dtype, seed)
    log_decay = -drawn.w.exp()
    if problem.log_decay is not None and math.isnan(problem.log_decay):
        log_decay = torch.linspace(-20, 0.05, problem.C, dtype=log_decay.dtype)
    elif problem.log_decay is not None:
        log_decay = torch.full_like(log_decay, problem.log_decay)
    return Tensors(log_decay, drawn.u, drawn.k, drawn.v, drawn.gy, drawn.r, drawn.cu_seqlens)


def direct(
    log_decay: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The sum over all pairs of steps, of packed sequences one after the other."""
    if cu_seqlens is None:
        return reference.bi_wkv_direct(log_decay, u, k, v, r)
    places = [slice(begin, end) for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    gates = [None if r is None else r[:, place] for place in places]
    parts = zip(places, gates, strict=True)
    return torch.cat([reference.bi_wkv_direct(log_decay, u, k[:, at], v[:, at], gate) for at, gate in parts], 1)


def solve(tensors: Tensors, function: Callable[..., Tensor]) -> dict[str, Tensor]:
    """y and the gradients of Σ y·gy, by name, of a function of bi_wkv's tensors."""
    leaves = tensors.leaves()
    options: dict[str, Any] = {"r": leaves.get("r"), "cu_seqlens": tensors.cu_seqlens}
    y = function(*(leaves[name] for name in ("log_decay", "u", "k", "v")), **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors.gy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"g{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def solve_by(tensors: Tensors, backend: str) -> dict[str, Tensor]:
    """The same by a backend."""
    return solve(tensors, lambda *inputs, **options: rwkv_kernels.bi_wkv(*inputs, **options, backend=backend))


def largest_logit(tensors: Tensors) -> float:
    """Of a weight as it is held, and of the gate.

    A running maximum loses |log_decay| in a step until it is at the keys again, and gains it in every step where the
    weights grow.
    """
    decay, growth = (float((sign * tensors.log_decay.double()).max().clamp(min=0)) for sign in (-1, 1))
    gate = 0.0 if tensors.r is None else float(tensors.r.double().abs().max())
    of_inputs = float(tensors.k.double().abs().max() + tensors.u.double().abs().max())
    return of_inputs + min(decay, 100.0) + growth * tensors.steps + gate


def least_scale(name: str, tensors: Tensors) -> float:
    """The size of the terms of a sum, where cancellation leaves less.

    A term of the gradient of the log-decay has the distance as a factor, as far as weights reach.
    """
    if name not in ("gk", "gu", "gr", "glog_decay"):
        return torch.finfo(torch.float32).tiny
    size = float(tensors.gy.abs().max() * tensors.v.abs().max())
    if name == "glog_decay":
        decay = float(-tensors.log_decay.double().max())
        size *= min(tensors.steps, 1 / decay) if decay > 0 else tensors.steps
    return size


def assert_solves(tensors: Tensors, backend: str, exact: Callable[..., Tensor] = direct) -> None:
    """y and its gradients equal the exact ones, which are computed on the CPU."""
    assert_all_close(solve_by(tensors, backend), tensors, exact)


def assert_all_close(results: dict[str, Tensor], tensors: Tensors, exact: Callable[..., Tensor] = direct) -> None:
    """The same of results that are there, by name."""
    found = {name: x.cpu() for name, x in results.items()}
    on_cpu = tensors.changed(Tensor.cpu)
    logit, dtype = largest_logit(on_cpu), tensors.k.dtype
    for name, right in solve(on_cpu.exact(), exact).items():
        is_sum = name in ("glog_decay", "gu")
        output_dtype = state_dtype(dtype) if is_sum else dtype
        allowed = problems.tolerance(output_dtype, tensors.k.shape[1] if is_sum else tensors.steps, logit)
        assert_tensor_close(name, found[name], right, allowed, least_scale(name, on_cpu))
