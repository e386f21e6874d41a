"""Problems for the operator as data, their exact solutions, and the one rule for tolerances."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import rwkv_kernels
from rwkv_kernels import native
from rwkv_kernels._backends.registry import BACKENDS
from rwkv_kernels._backends.triton.plan import CHECKPOINT_INTERVAL
from rwkv_kernels.reference import state_dtype


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes of k that the backend takes."""
    return BACKENDS[backend].dtypes


def widest_dtype(backend: str) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes_of(backend) else torch.float32


INTERVAL = CHECKPOINT_INTERVAL  # in float32; cases lie on both sides of it


@dataclass(frozen=True)
class Problem:
    """Shapes and magnitudes; `make` draws the tensors."""

    B: int = 2
    T: int = 37
    C: int = 19
    k_scale: float = 1.0
    log_decay: float | None = None  # None: drawn around -e^-1
    u: float | None = None  # None: drawn from N(0, 1)
    with_state: bool = False
    layout: str = "contiguous"  # how k, v and r lie in memory
    gated: bool = False  # with an r as large as k
    lengths: tuple[int, ...] | None = None  # of sequences that are packed into B = 1 and T = their sum


PROBLEMS = {
    "small": Problem(),
    "small_with_state": Problem(with_state=True),
    "one_step": Problem(T=1),
    "one_step_with_state": Problem(T=1, with_state=True),
    "one_of_everything": Problem(B=1, T=1, C=1),
    "one_channel": Problem(B=1, T=600, C=1, with_state=True),
    "below_a_tile": Problem(T=15),
    "a_tile": Problem(T=16, C=64),
    "below_a_checkpoint": Problem(T=INTERVAL - 1, C=33),
    "a_checkpoint": Problem(T=INTERVAL, C=33, with_state=True),
    "above_a_checkpoint": Problem(T=INTERVAL + 1, C=33),
    "two_checkpoints_and_one": Problem(T=2 * INTERVAL + 1, C=16, with_state=True),
    "wide": Problem(B=1, T=40, C=200),
    "many_sequences": Problem(B=9, T=20, C=5),
    "no_decay": Problem(T=150, log_decay=-1e-9),
    "slow_decay": Problem(T=300, log_decay=-1e-3),
    "strong_decay": Problem(T=100, log_decay=-20.0),
    "strong_decay_of_few_steps": Problem(B=3, T=4, C=16, k_scale=0.1, log_decay=-20.0, u=-30.0),
    "decay_of_50": Problem(T=100, log_decay=-50.0, with_state=True),
    "decay_of_10000": Problem(log_decay=-1e4, with_state=True),
    "u_of_plus_50": Problem(T=80, u=50.0),
    "u_of_minus_50": Problem(T=80, u=-50.0, with_state=True),
    "u_of_plus_1000": Problem(u=1000.0),
    "u_of_minus_1000": Problem(u=-1000.0, with_state=True),
    "k_of_20": Problem(T=130, k_scale=20.0),
    "k_of_20_and_u_of_plus_25": Problem(T=80, k_scale=20.0, u=25.0),
    "k_of_20_and_u_of_minus_25": Problem(T=80, k_scale=20.0, u=-25.0, with_state=True),
    "k_of_1000": Problem(T=130, k_scale=1000.0, with_state=True),
    "k_of_10000": Problem(T=70, k_scale=1e4),
    "transposed": Problem(T=70, layout="transposed"),
    "time_major": Problem(T=70, C=32, layout="time_major", with_state=True),
    "every_second_channel": Problem(layout="every_second_channel"),
    "expanded": Problem(layout="expanded"),
}

ALL_LENGTHS = (1, 0, INTERVAL, 5, INTERVAL - 1, 2, INTERVAL + 1, 0, 2 * INTERVAL + 1, 3, 0)
MIXING_PROBLEMS = {
    "gated": Problem(gated=True),
    "gated_one_step": Problem(T=1, gated=True, with_state=True),
    "gated_above_a_checkpoint": Problem(T=INTERVAL + 1, C=66, gated=True, with_state=True),
    "gated_wide_and_long": Problem(B=1, T=300, C=200, gated=True),
    "gated_k_of_20": Problem(T=130, k_scale=20.0, gated=True),
    "gated_k_of_1000": Problem(T=130, k_scale=1000.0, gated=True, with_state=True),
    "gated_strong_decay": Problem(T=100, log_decay=-20.0, gated=True),
    "gated_u_of_plus_50": Problem(T=80, u=50.0, gated=True),
    "gated_transposed": Problem(T=70, layout="transposed", gated=True),
    "gated_time_major": Problem(T=70, C=32, layout="time_major", gated=True),
    "gated_every_second_channel": Problem(layout="every_second_channel", gated=True),
    "gated_expanded": Problem(layout="expanded", gated=True),
    "packed": Problem(lengths=(7, 30, 12)),
    "packed_one": Problem(lengths=(37,), with_state=True),
    "packed_of_all_lengths": Problem(C=33, lengths=ALL_LENGTHS, with_state=True),
    "packed_many_tiny": Problem(C=66, lengths=(1, 2, 1, 1, 3, 1, 0, 1) * 12, with_state=True),
    "packed_one_huge": Problem(C=16, lengths=(3, 700, 2), with_state=True),
    "packed_k_of_20": Problem(k_scale=20.0, lengths=(90, 1, 40)),
    "packed_k_of_1000": Problem(k_scale=1000.0, lengths=(90, 1, 40), with_state=True),
    "packed_no_decay": Problem(log_decay=-1e-9, lengths=(64, 150)),
    "packed_time_major": Problem(C=32, lengths=(20, 50), layout="time_major"),
    "packed_every_second_channel": Problem(lengths=(20, 17), layout="every_second_channel"),
    "gated_and_packed": Problem(C=66, lengths=(7, 130, 12), gated=True, with_state=True),
    "gated_and_packed_of_all_lengths": Problem(C=33, lengths=ALL_LENGTHS, gated=True, with_state=True),
    "gated_and_packed_k_of_20": Problem(k_scale=20.0, lengths=(90, 1, 40), gated=True),
}


@dataclass
class Tensors:
    """The tensors of the operator (w, u, k, v, state, r, cu_seqlens) and of its backward (gy, gstate)."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    gy: Tensor
    gstate: Tensor
    r: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Of the plain operator."""
        return self.w, self.u, self.k, self.v, self.state

    @property
    def options(self) -> dict[str, Tensor | None]:
        """The other arguments of `wkv`."""
        return {"r": self.r, "cu_seqlens": self.cu_seqlens}

    @property
    def steps(self) -> int:
        """Of the longest sequence."""
        return self.k.shape[1] if self.cu_seqlens is None else int(self.cu_seqlens.diff().max())

    def exact(self) -> "Tensors":
        """The same numbers in float64, so that only the operator's own rounding remains between two results."""
        return self.changed(lambda x: x.double() if x.is_floating_point() else x)

    def widest(self, backend: str) -> "Tensors":
        """In the widest dtype of the backend, for claims that are exact except for rounding."""
        return self.exact() if widest_dtype(backend) == torch.float64 else self

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Tensors":
        """The same, with the function applied to every tensor."""
        return replace(self, **{name: change(x) for name, x in vars(self).items() if x is not None})


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, differently in memory."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "time_major":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every_second_channel":
        return torch.stack((x, x + 1), -1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def checkpoint_interval(dtype: torch.dtype | str) -> int:
    """Steps between two checkpoints of the compiled operators, as their library reports."""
    return int(native.operators.info["checkpoint_intervals"][str(dtype).removeprefix("torch.")])


def make(problem: Problem, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """The problem's tensors: the same numbers on every device, and on torch's default one, the backend's in a test."""
    draw = torch.Generator().manual_seed(seed)
    device = torch.get_default_device()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(device)

    B, T, C = problem.B, problem.T, problem.C
    N, cu_seqlens = B, None
    if problem.lengths is not None:
        B, T, N = 1, sum(problem.lengths), len(problem.lengths)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(problem.lengths)], dtype=torch.int32, device=device)
    parameter = state_dtype(dtype)
    log_decay = normal(C).exp() * math.exp(-1) if problem.log_decay is None else torch.full((C,), -problem.log_decay)
    u = normal(C) if problem.u is None else torch.full((C,), problem.u)
    state = torch.stack((normal(N, C), normal(N, C).exp(), normal(N, C)), 1)
    return Tensors(
        w=log_decay.log().to(parameter),
        u=u.to(parameter),
        k=_lay_out((normal(B, T, C) * problem.k_scale).to(dtype), problem.layout),
        v=_lay_out(normal(B, T, C).to(dtype), problem.layout),
        state=state.to(parameter) if problem.with_state else None,
        gy=normal(B, T, C).to(dtype),
        gstate=normal(N, 3, C).to(parameter),
        r=_lay_out((normal(B, T, C) * problem.k_scale).to(dtype), problem.layout) if problem.gated else None,
        cu_seqlens=cu_seqlens,
    )


def without_gauge(y: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """Results that two implementations have in common: y, and what a state says whatever its max."""
    return y, state[:, 0] / state[:, 1], log_denominator(state)


def log_denominator(state: Tensor) -> Tensor:
    return state[:, 2] + state[:, 1].log()


def solve(tensors: Tensors, backend: str, scale_of_state: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of Σ y·gy + Σ (num, den)·gstate, by name.

    A state is known up to its gauge: it is reported as num/den and log of den·e^max, and its gradient is taken at one
    scale for every backend, e^scale_of_state [B, C], by default its own denominator.
    """
    given = {name: getattr(tensors, name) for name in ("w", "u", "k", "v", "state", "r")}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    y, state = rwkv_kernels.wkv(**leaves, cu_seqlens=tensors.cu_seqlens, return_state=True, backend=backend)
    own_scale = log_denominator(state.detach()) if scale_of_state is None else scale_of_state
    change = torch.exp(state[:, 2].detach() - own_scale)
    loss = (y.double() * tensors.gy).sum() + (state[:, :2].double() * (change[:, None] * tensors.gstate[:, :2])).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"y": y, "state_mean": state[:, 0] / state[:, 1], "state_log_den": log_denominator(state)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"g{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: x.detach() for name, x in results.items()}


def oracle(tensors: Tensors) -> dict[str, Tensor]:
    return solve(tensors.exact(), "reference")


def summaries(tensors: Tensors) -> dict[str, Tensor]:
    """The exact state that the steps leave behind an empty one, and the adjoint before them if that after is zero."""
    w, u, k, v, state = tensors.exact().inputs
    state = rwkv_kernels.empty_state(k.shape[0], k.shape[2], dtype=torch.float64) if state is None else state
    r = None if tensors.r is None else tensors.r.double()
    _, own = rwkv_kernels.wkv(w, u, k, v, return_state=True, backend="reference")
    y = rwkv_kernels.wkv(w, u, k, v, state.requires_grad_(), r=r, backend="reference")
    (gstate,) = torch.autograd.grad(y, state, tensors.gy.double())
    return {"state_mean": own[:, 0] / own[:, 1], "state_log_den": log_denominator(own), "gstate": gstate[:, :2]}


def assert_summaries_close(own: Tensor, adjoint: Tensor, tensors: Tensors) -> None:
    found = {"state_mean": own[:, 0] / own[:, 1], "state_log_den": log_denominator(own), "gstate": adjoint}
    on_cpu = tensors.changed(Tensor.cpu)
    assert_close({name: x.cpu() for name, x in found.items()}, summaries(on_cpu), on_cpu)


def largest_logit(tensors: Tensors) -> float:
    """Of the weights, and of the gate: the weight of r beside one of 0."""
    decay = float(tensors.w.double().exp().max())
    gate = 0.0 if tensors.r is None else float(tensors.r.double().abs().max())
    return float(tensors.k.double().abs().max() + tensors.u.double().abs().max()) + min(decay, 100.0) + gate


def tolerance(dtype: torch.dtype, T: int, logit: float) -> float:
    """How far a correct kernel may be from the exact result, relative to the largest element of each tensor.

    Every sum passes through about four roundings a step, each at most half an ulp of the accumulation type and of
    either sign, so that sqrt(4T) of them are expected to remain, and six times that practically never (Higham and Mary,
    2019). A logit x is rounded by x/2 ulp, which is a relative error of its weight e^x, and again in every step that
    the running maximum decays. The result is rounded once more, to the output's type. In float64 the oracle is no more
    exact than the kernel, so both errors count.
    """
    unit = torch.finfo(state_dtype(dtype)).eps / 2
    accumulated = 6 * unit * math.sqrt(T) * (2 + logit)
    return (2 if dtype == torch.float64 else 1) * accumulated + torch.finfo(dtype).eps / 2


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tensors: Tensors, what: str = "") -> None:
    k = tensors.k
    logit = largest_logit(tensors)
    for name, exact in expected.items():
        output_dtype = k.dtype if name in ("y", "gk", "gv", "gr") else state_dtype(k.dtype)
        # The gradients of w and u are sums over all sequences, in float64 over those of a batch.
        allowed = tolerance(output_dtype, k.shape[1] if name in ("gw", "gu") else tensors.steps, logit)
        assert_tensor_close(f"{what}{name}", found[name], exact, allowed, least_scale(name, tensors))


def assert_solves(tensors: Tensors, backend: str, exact_backend: str = "reference") -> None:
    """Outputs and gradients equal the exact ones, which are computed on the CPU."""
    _, final = rwkv_kernels.wkv(*tensors.inputs, **tensors.options, return_state=True, backend=backend)
    found = {name: x.cpu() for name, x in solve(tensors, backend).items()}
    on_cpu = tensors.changed(Tensor.cpu)
    assert_close(found, solve(on_cpu.exact(), exact_backend, log_denominator(final.double()).cpu()), on_cpu)


def least_scale(name: str, tensors: Tensors) -> float:
    """The size that an error is relative to even where the exact result is smaller.

    Roundings are relative to the terms of a sum, not to what cancellation leaves: gy·(v - y) is made of terms of the
    size of gy·v even where v = y.
    """
    if name in ("gk", "gw", "gu", "gr"):
        return float(tensors.gy.abs().max() * tensors.v.abs().max())
    return torch.finfo(torch.float32).tiny


def assert_tensor_close(name: str, found: Tensor, exact: Tensor, allowed: float, least: float = 1e-30) -> None:
    """Fails with the worst place and both values, and with the places where only one of the two is NaN or infinite."""
    found, exact = found.detach().double(), exact.detach().double()
    assert found.shape == exact.shape, f"{name}: shape {list(found.shape)}, expected {list(exact.shape)}"
    odd = found.isfinite() != exact.isfinite()
    odd |= found.isnan() != exact.isnan()
    assert not odd.any(), (
        f"{name}: not finite in one of the two at {odd.nonzero()[:5].tolist()} ({int(odd.sum())} places)"
    )
    finite = exact.isfinite()
    if not finite.any():
        return
    scale = max(float(exact[finite].abs().max()), least)
    difference = torch.where(finite, (found - exact).abs(), 0) / scale
    worst = int(difference.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape)]
    assert float(difference.flatten()[worst]) <= allowed, (
        f"{name}{place}: {float(found.flatten()[worst]):.9g}, exact {float(exact.flatten()[worst]):.9g}, "
        f"off by {float(difference.flatten()[worst]):.2e} of the largest element, allowed {allowed:.2e}"
    )
