"""The example's training: the same losses for every number of processes, and from every checkpoint."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from rwkv_kernels import native

pytest.importorskip("rich", reason="rich is not installed")
if native.operators.why_missing is not None or not dist.is_available():
    pytest.skip("needs the library and gloo", allow_module_level=True)

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 4


def train(folder: Path, sizes: tuple[int, int], until: int) -> None:
    """Goes on from the folder's newest checkpoint, and leaves another one; in a process of its own."""
    sys.path.insert(0, str(EXAMPLES))  # before tools/, which has another `report`
    from torch.distributed.device_mesh import init_device_mesh
    from train_bytes import read_text
    from train_distributed import Run

    run = Run(init_device_mesh("cpu", sizes, mesh_dim_names=("data", "context")), torch.float32, folder)
    run.resume()
    text = read_text(EXAMPLES)
    while len(run.losses) < until:
        run.train_step(text, STEPS)
    run.save()


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / f"step-{STEPS:06}" / "losses.json").read_text()))


def test_losses_depend_neither_on_the_processes_nor_on_an_interruption(tmp_path: Path) -> None:
    on_ranks(1, train, tmp_path / "whole", (1, 1), STEPS)
    on_ranks(2, train, tmp_path / "resumed", (1, 2), 2)
    on_ranks(1, train, tmp_path / "resumed", (1, 1), STEPS)
    expected, found = (losses(tmp_path / name) for name in ("whole", "resumed"))
    assert len(expected) == STEPS and expected[-1] < expected[0] - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
