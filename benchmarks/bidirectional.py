"""Time of mixing all tokens of an image, by bi_wkv with its gate and by torch's attention, at three sizes of image."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import mixers
from benchmarks.device import Call, Device, timed
from benchmarks.records import Record, Row
from rwkv_kernels import BackendUnavailable, bi_wkv

TITLE = "Every token of an image sees every other: bi_wkv with its gate, and attention without a mask"

LENGTHS = [196, 1024, 4096]  # images of 14, 32 and 64 patches to a side
# The same tokens at every T, so that times of a mixer compare down the table.
TOKENS = {"cuda": 2**17, "cpu": 2**12, "smoke": 2**10}
# Those of Vision-RWKV's base and tiny models, and of the vision transformers of these names.
WIDTH = {"cuda": 768, "cpu": 192, "smoke": 64}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32, "smoke": torch.float32}
PASSES = ("forward", "forward and backward")
PATIENCE = 20.0  # seconds for the runs of one call
OURS, THEIRS = "bi_wkv, gated", "attention"


@dataclass
class Images:
    """Projections r, k, v [B, T, C] of images on torch's default device, a new model's decays, gradients of y."""

    T: int
    B: int
    C: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.r, self.k, self.v, self.gy = torch.randn(4, self.B, self.T, self.C, dtype=self.dtype).unbind()
        self.log_decay, self.u = torch.linspace(5, -3, self.C) / self.T, torch.full((self.C,), -1.2 / self.T)
        for x in (self.r, self.k, self.v, self.log_decay, self.u):
            x.requires_grad_()

    def mixings(self) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
        """The functions by name, with the tensors that each is given."""
        return {
            OURS: (_wkv, (self.r, self.k, self.v, self.log_decay, self.u)),
            THEIRS: (_attention, (self.r, self.k, self.v)),
        }

    def prepare(self, who: str, operation: str) -> Call:
        """A call without gradients, or with those of all that the function is given."""
        function, given = self.mixings()[who]

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*given)

        def forward_and_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*given), given, self.gy)

        return forward if operation == "forward" else forward_and_backward


def run(device: Device, record: Record) -> None:
    """Checks both, then times them in turns at each length."""
    C, dtype = WIDTH[device.scale], DTYPE[device.scale]
    try:
        with device.default():
            check(dtype)
    except BackendUnavailable as refusal:
        print(f"{OURS}: not offered here ({refusal})", flush=True)
        return
    rows: list[Row] = []
    for T in LENGTHS[:2] if device.smoke else LENGTHS:
        B = max(1, TOKENS[device.scale] // T)
        for operation in PASSES:
            with record.attempt(f"T = {T}, {operation}"):
                with device.default():
                    images = Images(T, B, C, dtype)
                seconds = device.patiently({who: images.prepare(who, operation) for who in images.mixings()}, PATIENCE)
                ours = statistics.median(seconds[OURS])
                rows += [
                    {"who": who, "pass": operation, "B, T, C": f"{B}, {T}, {C}", **timed(samples)}
                    | {"of our time": statistics.median(samples) / ours}
                    for who, samples in seconds.items()
                ]
                record.add(TITLE, ["who", "pass", "B, T, C"], rows)
                print(f"T = {T}, {operation}: attention {rows[-1]['of our time']:.3g} of our time", flush=True)


def check(dtype: torch.dtype) -> None:
    """Compares y and all gradients with each definition, written out in float64: each function must match its name."""
    T, C = 48, 2 * mixers.HEAD_CHANNELS
    images = Images(T, 2, C, dtype)
    definitions = {OURS: _wkv_written_out, THEIRS: _attention_written_out}
    allowed = 4 * torch.finfo(dtype).eps + 100 * torch.finfo(torch.float32).eps * T**0.5
    for who, (function, given) in images.mixings().items():
        exact = tuple(x.detach().double().requires_grad_() for x in given)
        found, expected = _results(function, given, images.gy), _results(definitions[who], exact, images.gy.double())
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            # Gradients of log_decay and u are sums over tokens whose terms cancel, and are rounded relative to these.
            error = float((a.double() - b).abs().max() / max(float(b.abs().max()), 1.0))
            assert error <= allowed, f"{who}: result {i} is off by {error:.1e}, allowed {allowed:.1e}"


def _results(function: Callable[..., Tensor], given: tuple[Tensor, ...], gy: Tensor) -> tuple[Tensor, ...]:
    y = function(*given)
    return y.detach(), *torch.autograd.grad(y, given, gy)


def _wkv(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor) -> Tensor:
    return bi_wkv(log_decay, u, k, v, r=r)


def _attention(r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mixers.joined(F.scaled_dot_product_attention(*map(mixers.heads, (r, k, v))))


def _wkv_written_out(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor) -> Tensor:
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t[:, None] - t).abs()[..., None]
    weights = (k[:, None] + torch.where(distance > 0, (distance - 1) * log_decay, u)).softmax(2)
    return torch.sigmoid(r) * (weights * v[:, None]).sum(2)


def _attention_written_out(r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, keys, values = (x.unflatten(-1, (-1, mixers.HEAD_CHANNELS)) for x in (r, k, v))
    weights = (torch.einsum("bthd,bshd->bhts", q, keys) / mixers.HEAD_CHANNELS**0.5).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, values).flatten(2)
