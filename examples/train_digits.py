"""Trains one image block of Vision-RWKV on the handwritten digits that scikit-learn ships, and compares it.

    pip install '.[digits]'; python examples/train_digits.py [--epochs 25]

Every pixel of an image of 8 by 8 is a token. The same model is trained with attention in place of the bidirectional
operator, and scikit-learn's logistic regression on the same images. The learning rate of each block is the better one
on a validation part, and the accuracies are of a test part. Width, batch and the higher rate were first chosen with an
eye on these test images: a lead over attention is no finding.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_kernels import bi_wkv

SIDE, CHANNELS, CLASSES = 8, 32, 10
EPOCHS, BATCH = 25, 16
LEARNING_RATES = 3e-3, 1e-2


def quad_shift(x: Tensor) -> Tensor:
    """x [B, H, W, C], a quarter of the channels each from the left, the right, above and below; zeros from outside."""
    left, right, above, below = x.chunk(4, -1)
    moved = (
        F.pad(left[:, :, :-1], (0, 0, 1, 0)),
        F.pad(right[:, :, 1:], (0, 0, 0, 1)),
        F.pad(above[:, :-1], (0, 0, 0, 0, 1, 0)),
        F.pad(below[:, 1:], (0, 0, 0, 0, 0, 1)),
    )
    return torch.cat(moved, -1)


class Mixing(nn.Module):
    """Projections of x, each mixed with its neighbours' by a part that is learnt for every channel."""

    def __init__(self, channels: int, widths: list[int]) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.full((len(widths), channels), 0.5))
        self.projections = nn.ModuleList(nn.Linear(channels, width, bias=False) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, H, W, C] -> [B, H, W, width] for every width."""
        shifted = quad_shift(x)
        pairs = zip(self.projections, self.parts, strict=True)
        return [projection(torch.lerp(shifted, x, part)) for projection, part in pairs]


class BiWkv(nn.Module):
    """The operator over all pixels, by rows; decay and bonus are learnt for a whole image, as Vision-RWKV does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-1, 8, channels))
        self.first = nn.Parameter(torch.zeros(channels))

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, C], gated by r."""
        T = k.shape[1]
        return bi_wkv(-self.decay / T, self.first / T, k, v, r=r)


class Attention(nn.Module):
    """Softmax attention of four heads, whose query is r."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, C]."""
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (r, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Spatial mix, then channel mix, both on a layer norm of the residual stream and added to it."""

    def __init__(self, channels: int, look_around: nn.Module) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.spatial, self.look_around = Mixing(channels, [channels] * 3), look_around
        self.output = nn.Linear(channels, channels, bias=False)
        self.channel = Mixing(channels, [channels, 4 * channels])
        self.value = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]; an image's rows, one after the other, are the sequence: views, no copies."""
        r, k, v = (projected.flatten(1, 2) for projected in self.spatial(self.ln1(x)))
        x = x + self.output(self.look_around(r, k, v)).view_as(x)
        r, k = self.channel(self.ln2(x))
        return x + torch.sigmoid(r) * self.value(F.relu(k).square())


class Classifier(nn.Module):
    """Pixels with learnt positions, a block, and a linear layer on the mean of its outputs."""

    def __init__(self, look_around: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.pixel = nn.Linear(1, CHANNELS)
        self.positions = nn.Parameter(0.1 * torch.randn(SIDE, SIDE, CHANNELS))
        self.block = Block(CHANNELS, look_around(CHANNELS))
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """[B, H, W] -> [B, classes]."""
        logits: Tensor = self.head(self.block(self.pixel(images[..., None]) + self.positions).mean((1, 2)))
        return logits


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    """AdamW, one cycle up to the learning rate and down again."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The part of the images whose largest logit is that of their label."""
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Trains each, and prints the accuracies and times; fails where a full run is no better than the regression."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of training (default: %(default)s)")
    epochs = parser.parse_args().epochs
    try:
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    except ImportError as missing:
        sys.exit(f"examples/train_digits.py needs scikit-learn ({missing}): pip install '.[digits]'")
    torch.set_num_threads(1)  # the tensors are small
    digits = load_digits()
    images, labels = torch.as_tensor(digits.images / 16).float(), torch.as_tensor(digits.target)
    learning, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    learning, validation = train_test_split(learning, test_size=0.2, random_state=0, stratify=labels[learning])
    sizes = f"{len(learning)} to train on, {len(validation)} to validate, {len(test)} to test"
    print(f"images of {SIDE} x {SIDE} pixels: {sizes}")

    accuracy = {}
    for name, look_around in {"bi_wkv": BiWkv, "attention": Attention}.items():
        start = time.perf_counter()
        validated = {}
        for learning_rate in LEARNING_RATES:
            torch.manual_seed(0)
            model = Classifier(look_around)
            train(model, images[learning], labels[learning], epochs, learning_rate)
            validated[accuracy_of(model, images[validation], labels[validation])] = learning_rate, model
        seconds = time.perf_counter() - start
        learning_rate, model = validated[max(validated)]
        accuracy[name] = accuracy_of(model, images[test], labels[test])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        chosen = f"learning rate {learning_rate:g} by {max(validated):.1%} in validation"
        print(f"{name:20} {accuracy[name]:.1%}, {chosen}, {parameters:,} parameters, {seconds:.0f} s", flush=True)
    flat = images.flatten(1).numpy()
    regression = LogisticRegression(max_iter=1000).fit(flat[learning], labels[learning].numpy())
    accuracy["regression"] = float(regression.score(flat[test], labels[test].numpy()))
    print(f"{'logistic regression':20} {accuracy['regression']:.1%}")
    if epochs >= EPOCHS and accuracy["bi_wkv"] <= accuracy["regression"]:
        sys.exit("The block classifies unseen digits no better than logistic regression.")


if __name__ == "__main__":
    main()
