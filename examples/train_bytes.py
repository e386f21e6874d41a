"""Trains a byte-level RWKV for a few minutes, and compares it with compression and attention.

    python examples/train_bytes.py [--text FILE_OR_FOLDER] [--minutes 3.5]

The text is the source code of Python's standard library by default. The end of it is held out, and the model
has to predict it in fewer bits per byte than zlib compresses it to. A report with plots is written to demo/.
"""

import argparse
import math
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from report import LossPoint, Timing, write_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.nn import RWKV

DEFAULT_MINUTES = 3.5
CHANNELS, LAYERS = 192, 3
# So short a training learns more from many places than from long windows. After training, the state still carries
# context from further back than a window.
BATCH, CONTEXT = 8, 128
LEARNING_RATE, WARM_UP = 4e-3, 0.03
LEAST_BYTES, HELD_OUT_BYTES = 100_000, 400_000
PROMPT = b"\n    def "
SAMPLES = 3
LONGEST = 16384  # attention's matrix takes 1 GiB there

console = Console()


def read_text(path: Path | None) -> Tensor:
    """All bytes of a file, of a folder's files, or of the standard library's sources, [N] uint8."""
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "test", "tests"}
        files = [file for file in library.rglob("*.py") if not skipped & set(file.relative_to(library).parts)]
    else:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in sorted(files))), dtype=torch.uint8)


def order_0_bits(text: Tensor) -> float:
    """Bits per byte of a code that uses only the frequency of each byte."""
    frequencies = text.bincount().double() / len(text)
    return float(-torch.special.xlogy(frequencies, frequencies).sum()) / math.log(2)


def zlib_bits(text: Tensor) -> float:
    """Bits per byte of the text, compressed by zlib as well as it can."""
    return 8 * len(zlib.compress(text.numpy().tobytes(), 9)) / len(text)


def train(model: RWKV, text: Tensor, minutes: float) -> list[LossPoint]:
    """AdamW on random windows of the text, the learning rate a warm-up and a half cosine over the time given."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TimeRemainingColumn())
    figures = TextColumn("{task.fields[bits]:.2f} bits per byte, {task.fields[speed]:,.0f} bytes/s")
    history: list[LossPoint] = []
    window = torch.arange(CONTEXT + 1)
    with Progress(*columns, figures, console=console) as progress:
        task = progress.add_task("", total=1, step=0, bits=8, speed=0)
        start = time.perf_counter()
        while (elapsed := (time.perf_counter() - start) / (60 * minutes)) < 1:
            decay = 0.5 + 0.5 * math.cos(math.pi * elapsed)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(elapsed / WARM_UP, decay)

            tokens = text[torch.randint(len(text) - CONTEXT, (BATCH, 1)) + window].long()
            logits, _ = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

            history.append(LossPoint(BATCH * CONTEXT * (len(history) + 1), loss.item() / math.log(2)))
            recent = [point.bits for point in history[-20:]]
            speed = history[-1].tokens / (time.perf_counter() - start)
            bits = sum(recent) / len(recent)
            progress.update(task, completed=elapsed, step=len(history), bits=bits, speed=speed)
    return history


@torch.no_grad()
def evaluate(model: RWKV, text: Tensor, streams: int = 8, chunk: int = 512) -> float:
    """Bits per byte over the whole text, read in chunks with the state carried from one to the next."""
    length = (len(text) - 1) // streams
    tokens = torch.stack([text[i * length : (i + 1) * length + 1] for i in range(streams)]).long()
    state, nats = None, 0.0
    for start in range(0, length, chunk):
        part = tokens[:, start : start + chunk + 1]
        logits, state = model(part[:, :-1], state)
        nats += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / (streams * length)


@torch.no_grad()
def recurrent_error(model: RWKV, text: Tensor) -> float:
    """The largest difference between the logits of one parallel pass and those of one byte after the other."""
    tokens = text[None].long()
    state = model.empty_state(1)
    one_by_one = torch.stack([model.step(token, state) for token in tokens.unbind(1)], 1)
    return float((model(tokens)[0] - one_by_one).abs().max())


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention with its whole T x T matrix."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    future = torch.ones(scores.shape, dtype=torch.bool).triu_(1)
    return scores.masked_fill_(future, -torch.inf).softmax(-1) @ v


@torch.no_grad()
def compare_times(limit: float) -> list[Timing]:
    """Seconds per forward call of wkv and of attention, T doubling from 256 until a call takes `limit` seconds."""
    timings: list[Timing] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other work of the machine disturbs one thread the least
    calls: dict[str, Callable[..., object]] = {
        "attention": attention,
        "wkv": lambda w, k, v: rwkv_kernels.wkv(w[0], w[0], k[None], v[None]),
    }
    for name, call in calls.items():
        steps, seconds = 256, 0.0
        while steps <= 1024 or (steps <= LONGEST and seconds < limit):
            inputs = torch.randn(3, steps, CHANNELS).unbind()
            call(*inputs)
            tries: list[float] = []
            while len(tries) < 3 or sum(tries) < 0.1 * limit:
                start = time.perf_counter()
                call(*inputs)
                tries.append(time.perf_counter() - start)
            seconds = min(tries)
            timings.append(Timing(name, steps, seconds))
            steps *= 2
    torch.set_num_threads(threads)
    return timings


def main() -> None:
    """Trains, evaluates, compares, and fails where a full run does not beat the other codes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file or folder; default: the sources of the standard library")
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="of training (default: %(default)s)")
    arguments = parser.parse_args()
    text = read_text(arguments.text)
    if len(text) < LEAST_BYTES:
        parser.error(f"{len(text)} bytes of text are too few, at least {LEAST_BYTES} are needed")

    torch.manual_seed(0)
    # A shorter run is smaller in every respect.
    scale = min(1.0, arguments.minutes / DEFAULT_MINUTES)
    cut = len(text) - min(HELD_OUT_BYTES, len(text) // 10)
    held_out = text[cut:][: max(4096, int(scale * HELD_OUT_BYTES))]
    model = RWKV(256, CHANNELS, LAYERS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{cut:,} bytes to train on, {len(held_out):,} held out, {parameters:,} parameters")

    history = train(model, text[:cut], arguments.minutes)
    bits = {"RWKV": evaluate(model, held_out), "zlib -9": zlib_bits(held_out), "order 0": order_0_bits(held_out)}
    error = recurrent_error(model, held_out[:256])
    generated = model.generate(torch.tensor([list(PROMPT)] * SAMPLES), 250, top_p=0.95)
    sample = "\n\n".join(bytes(row).decode(errors="replace").strip("\n") for row in generated.tolist())
    console.rule("generated, byte by byte")
    console.print(sample, markup=False, highlight=False, soft_wrap=True)
    console.rule("held-out text, bits per byte")
    for name, value in bits.items():
        console.print(f"{name:8} {value:.3f}")
    console.print(f"parallel and recurrent logits differ by at most {error:.1e}")
    console.print(f"report: {write_report(Path('demo'), history, bits, compare_times(scale), error, sample)}")

    best = min(bits, key=bits.__getitem__)
    if arguments.minutes >= DEFAULT_MINUTES and best != "RWKV":
        sys.exit(f"The model predicts the held-out text no better than {best}: more --minutes are needed here.")


if __name__ == "__main__":
    main()
