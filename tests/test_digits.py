"""The example's image block; where scikit-learn is installed, a short run of it on its digits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_digits

    return train_digits


def test_a_quarter_of_the_channels_comes_from_each_side(example: Any) -> None:
    B, H, W, C = 2, 3, 4, 8
    x = torch.randn(B, H, W, C)
    shifted = example.quad_shift(x)
    for h in range(H):
        for w in range(W):
            for i, (row, column) in enumerate([(h, w - 1), (h, w + 1), (h - 1, w), (h + 1, w)]):
                own = slice(i * C // 4, (i + 1) * C // 4)
                inside = 0 <= row < H and 0 <= column < W
                neighbour = x[:, row, column, own] if inside else torch.zeros(B, C // 4)
                assert torch.equal(shifted[:, h, w, own], neighbour)


def test_the_operator_is_given_views_of_the_projections(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, ...]] = []
    projected: list[Tensor] = []
    model = example.Classifier(example.BiWkv)
    for projection in model.block.spatial.projections:
        projection.register_forward_hook(lambda module, inputs, output: projected.append(output))
    model.block.look_around.register_forward_hook(lambda module, inputs, output: given.append(inputs))
    model(torch.randn(3, 8, 8))
    assert [x.data_ptr() for x in given[0]] == [x.data_ptr() for x in projected]


@pytest.mark.parametrize("look_around", ["BiWkv", "Attention"])
def test_every_parameter_of_the_classifier_learns(example: Any, look_around: str) -> None:
    model = example.Classifier(getattr(example, look_around))
    model(torch.randn(3, 8, 8)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["bi_wkv", "attention", "logistic"]
