"""Trains the model of train_bytes.py on several devices: data parallel by FSDP2, and parallel over the context.

    torchrun --nproc-per-node 2 examples/train_distributed.py --context 2 --steps 200
    torchrun --nproc-per-node 4 examples/train_distributed.py --context 2 --steps 400   # resumes, on four processes

Every process has some sequences of the batch and some steps of these: `--context` is how many share a sequence. Blocks
are checkpointed and compute in bfloat16; parameters, their gradients' sums and the optimizer are float32. The folder
gets checkpoints, which any number of processes resumes from, and the losses, which do not depend on that number.
"""

import argparse
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from train_bytes import BATCH, CHANNELS, CONTEXT, LAYERS, LEARNING_RATE, WARM_UP, read_text

from rwkv_kernels.distributed import parallelize
from rwkv_kernels.nn import RWKV

SEED = 0


def make_model(mesh: DeviceMesh, dtype: torch.dtype) -> RWKV:
    """The model over the mesh; the same parameters for every number of processes."""
    torch.manual_seed(SEED)
    model = RWKV(256, CHANNELS, LAYERS).to(mesh.device_type)
    parallelize(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def draw(text: Tensor, step: int) -> Tensor:
    """The step's windows of the text, [BATCH, CONTEXT + 1]: the same for every number of processes."""
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)].long()


def own_part(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's sequences and steps of [BATCH, T]."""
    rows = tokens.tensor_split(mesh["data"].size(), 0)[mesh.get_local_rank("data")]
    return rows.tensor_split(mesh["context"].size(), 1)[mesh.get_local_rank("context")]


class Run:
    """A training, but for its text: model, optimizer and losses, saved and loaded by any number of processes."""

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype, folder: Path) -> None:
        self.mesh, self.folder = mesh, folder
        self.model = make_model(mesh, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        self.losses: list[float] = []

    def train_step(self, text: Tensor, steps: int) -> None:
        """One step of AdamW at a learning rate that rises over the first of `steps` and falls with the rest."""
        step = len(self.losses)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / (WARM_UP * steps), decay)
        tokens = draw(text, step)
        inputs, targets = (own_part(x, self.mesh).to(self.mesh.device_type) for x in (tokens[:, :-1], tokens[:, 1:]))
        logits, _ = self.model(inputs)
        # The share of the mean over all tokens. FSDP2 takes the mean of the processes' gradients, and not their sum.
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / (BATCH * CONTEXT)
        self.optimizer.zero_grad()
        (loss * dist.get_world_size()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        self.losses.append(total.item() / math.log(2))

    def _contents(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self) -> None:
        """Writes a checkpoint; a process that fails while it is written leaves the one before."""
        target = self.folder / f"step-{len(self.losses):06}"
        dcp.save(self._contents(), checkpoint_id=target)
        if dist.get_rank() == 0:
            # The last file of a checkpoint: without it the folder is none.
            (target / "losses.json").write_text(json.dumps(self.losses))
        dist.barrier()

    def resume(self) -> None:
        """Loads the newest complete checkpoint, if there is one."""
        complete = sorted(self.folder.glob("step-*/losses.json"))
        if complete:
            contents = self._contents()
            dcp.load(contents, checkpoint_id=complete[-1].parent)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=contents["model"],
                optim_state_dict=contents["optimizer"],
            )
            self.losses = json.loads(complete[-1].read_text())


def main() -> None:
    """Trains up to --steps, from the newest checkpoint in --folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file or folder; default: the sources of the standard library")
    parser.add_argument("--steps", type=int, default=200, help="of the whole training (default: %(default)s)")
    parser.add_argument("--until", type=int, help="stop after this step, as if interrupted")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--context", type=int, default=1, metavar="N", help="processes to a sequence (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("demo/distributed"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    processes, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if processes % arguments.context:
        parser.error(f"{processes} processes cannot share sequences by {arguments.context}")

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        torch.cuda.set_device(local)
    # Both backends: what the processes agree on then waits for no GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    sizes = (processes // arguments.context, arguments.context)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("data", "context"))
    run = Run(mesh, getattr(torch, arguments.dtype), arguments.folder)
    run.resume()

    text = read_text(arguments.text)
    columns = (TextColumn("step {task.completed}"), BarColumn(), TimeRemainingColumn())
    figures = TextColumn("{task.fields[bits]:.2f} bits per byte")
    console = Console(quiet=dist.get_rank() > 0)
    console.print(f"{sizes[0]} x {sizes[1]} processes, data x context; {len(run.losses)} steps are done")
    until = arguments.steps if arguments.until is None else min(arguments.until, arguments.steps)
    with Progress(*columns, figures, console=console, disable=dist.get_rank() > 0) as progress:
        task = progress.add_task("", total=arguments.steps, completed=len(run.losses), bits=8)
        while len(run.losses) < until:
            run.train_step(text, arguments.steps)
            if len(run.losses) % arguments.save_every == 0 or len(run.losses) == until:
                run.save()
            bits = sum(run.losses[-20:]) / len(run.losses[-20:])
            progress.update(task, completed=len(run.losses), bits=bits)
    console.print(f"losses and checkpoints: {arguments.folder}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
