"""Several questions to the same long text: it is read once, its state kept on disk, and branched for every question.

    python examples/prefix_cache.py [--checkpoint FILE_OR_FOLDER]

A state has the same size after any number of tokens, so the saved text takes a few kilobytes for each layer.
Tokens are bytes here, so a checkpoint must be one of a model of bytes; without one, the weights are random, which
changes only the answers.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.nn import RWKV, RWKVState

PREFIX = (rwkv_kernels.wkv.__doc__ or "").encode() * 2
QUESTIONS = [b"What is w?", b"And what does the bonus of the present token do to the mean?", b"Shapes?"]
NEW_TOKENS = 24


def random_model() -> RWKV:
    """A small model whose every branch does something."""
    torch.manual_seed(0)
    model = RWKV(vocab_size=256, channels=128, layers=4)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def padded_left(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, [B, T], every text at the end of its row."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return tokens, mask


@torch.no_grad()
def main() -> None:
    """Reads, keeps, branches, and compares with reading everything again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    model = RWKV.from_pretrained(arguments.checkpoint) if arguments.checkpoint else random_model()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.state"
        _, state = model(torch.tensor([list(PREFIX)]))
        state.save(path)
        print(f"{len(PREFIX)} bytes read once, kept in a file of {path.stat().st_size} bytes")
        kept = RWKVState.load(path)

    questions, mask = padded_left(QUESTIONS)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(QUESTIONS))]
    started = time.perf_counter()
    answers = []
    for token in model.stream(
        questions,
        NEW_TOKENS,
        attention_mask=mask,
        state=kept.take([0] * len(QUESTIONS)),
        top_p=0.9,
        stop_tokens=[ord("\n")],
        generator=generators,
    ):
        answers.append(token)  # a server would send it
    branched = torch.stack(answers, 1)
    seconds = time.perf_counter() - started
    for question, answer in zip(QUESTIONS, branched.tolist(), strict=True):
        print(f"{question.decode():65} {bytes(answer)!r}")

    whole, whole_mask = padded_left([PREFIX + question for question in QUESTIONS])
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(QUESTIONS))]
    started = time.perf_counter()
    read_again = model.generate(
        whole, NEW_TOKENS, attention_mask=whole_mask, top_p=0.9, stop_tokens=[ord("\n")], generator=generators
    )[:, whole.shape[1] :]
    again = time.perf_counter() - started
    same = "the same tokens" if torch.equal(branched, read_again) else "OTHER TOKENS"
    print(f"from the kept state {seconds * 1e3:.0f} ms, reading everything again {again * 1e3:.0f} ms: {same}")


if __name__ == "__main__":
    main()
