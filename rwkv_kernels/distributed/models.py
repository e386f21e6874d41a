"""`rwkv_kernels.nn.RWKV` over a mesh of devices, by the tools that torch has for it.

Tensor parallel is a plan of torch's styles and one style for what they do not know, the vectors of a time mixing.
Context parallel replaces the forward of a model's mixings by one whose token shift and WKV look across ranks. FSDP2 is
torch's own. `parallelize` applies what a mesh's dimensions are named after.
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from ..nn import RWKV, ChannelMix, RWKVState, TimeMix
from ..nn.layers import of_the_sums
from .context import sliced_wkv
from .operators import Operators
from .ranks import Group, Ranks, Slices
from .shift import sliced_shift

__all__ = ["TimeMixParallel", "context_parallel", "parallelize", "tensor_parallel_plan"]

# ---- tensor parallel: each device has some of the channels between the matrices of a mixing ----


class TimeMixParallel(ParallelStyle):
    """The style of a TimeMix whose key, value and receptance give DTensors cut over the channels.

    Its decay and bonus are cut alike, and so is a state that is passed whole. The state that it returns is a DTensor,
    [B, 3, C] cut over C, to be passed on as it is.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, TimeMix)
        for name in ("time_decay", "time_first"):
            whole = getattr(module, name)
            cut = distribute_tensor(whole.detach(), device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(cut, requires_grad=whole.requires_grad))

        def cut_state(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            state = arguments[2] if len(arguments) > 2 else None
            if not isinstance(state, Tensor) or isinstance(state, DTensor):
                return arguments
            whole = DTensor.from_local(state, device_mesh, [Replicate()], run_check=False)
            return (*arguments[:2], whole.redistribute(placements=[Shard(2)]), *arguments[3:])

        module.register_forward_pre_hook(cut_state)
        return module


def tensor_parallel_plan() -> dict[str, ParallelStyle]:
    """The plan of an RWKV for torch.distributed.tensor.parallel.parallelize_module, over a mesh of one dimension.

    The residual stream is whole on every device: two all-reduces of [B, T, C] a layer forward. Backward, each of the
    five matrices that take a mixture of tokens has one for its input, and the channel mixing gathers its output's.
    """

    def by_columns() -> ParallelStyle:
        return ColwiseParallel(use_local_output=False)

    block: dict[str, ParallelStyle] = {
        "att": TimeMixParallel(),
        "att.key": by_columns(),
        "att.value": by_columns(),
        "att.receptance": by_columns(),
        "att.output": RowwiseParallel(),
        "ffn.key": by_columns(),
        "ffn.receptance": by_columns(),
        "ffn.value": RowwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        "ffn": PrepareModuleOutput(
            output_layouts=(Shard(-1), None),
            desired_output_layouts=(Replicate(), None),  # type: ignore[arg-type]
        ),
    }
    return {
        "emb": RowwiseParallel(input_layouts=Replicate()),
        **{f"blocks.*.{name}": style for name, style in block.items()},
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


# ---- context parallel: each device has some steps of every sequence ----


def _time_mix(
    self: TimeMix, x: Tensor, shift: Tensor | None, state: Tensor | None, slices: Slices, in_place: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """TimeMix.forward of this rank's steps; `slices` arrives where packings do otherwise."""
    state = None if state is None else of_the_sums(state, x)
    previous, last = sliced_shift(slices, x, shift, return_last=True)
    k, v, r = self._project(x, previous)
    operators = Operators.of("auto", k)
    y, state = sliced_wkv(slices, operators, self.time_decay, self.time_first, k, v, state, r, return_state=True)
    out: Tensor = self.output(y)
    return out, last, state


def _channel_mix(self: ChannelMix, x: Tensor, shift: Tensor | None, slices: Slices) -> tuple[Tensor, Tensor | None]:
    """ChannelMix.forward, likewise."""
    previous, last = sliced_shift(slices, x, shift, return_last=True)
    return self._network(x, previous), last


def _model_forward(ranks: Ranks) -> Callable[..., tuple[Tensor, RWKVState]]:
    def forward(
        self: RWKV, tokens: Tensor | None = None, state: RWKVState | None = None, **unsupported: object
    ) -> tuple[Tensor, RWKVState]:
        misfit: Exception | None = None
        inputs = torch.empty(0)
        given: list[RWKVState | None] = [None] * len(self.blocks)
        try:
            if options := [name for name, value in unsupported.items() if value is not None and value is not False]:
                raise ValueError(f"{', '.join(options)}: not supported by a model that is cut over its context")
            inputs = self._checked_inputs(tokens, None)
            if state is not None:
                self._check_state(state, inputs.shape[0])
                of_the_sums(state.wkv, state.wkv)
                given = [RWKVState(*layer) for layer in zip(*(x.unbind() for x in state), strict=True)]
        except (TypeError, ValueError) as error:
            misfit = error
        of_x = torch.empty((), device=inputs.device).expand(*inputs.shape, self.emb.embedding_dim)
        slices = ranks.agree("RWKV", of_x, tuple(self.parameters()), misfit=misfit)
        x = self.emb(inputs)
        new = []
        for block, layer_state in zip(self.blocks, given, strict=True):
            x, layer_state = block(x, layer_state, slices)
            new.append(layer_state)
        after = RWKVState(*(torch.stack(tensors) for tensors in zip(*new, strict=True)))
        return self.head(self.ln_out(x)), after

    return forward


def context_parallel(model: RWKV, group: Group = None) -> RWKV:
    """Makes the model take each rank's own steps, and changes nothing else: every rank has all parameters.

    Then `model(tokens, state)`, of tokens [B, T] of which T may differ from rank to rank, gives this rank's logits and
    the state after the last rank's steps, on every rank; the state passed is that of the first rank. Gradients of
    parameters are this rank's share of them, which FSDP2 or DDP over all ranks adds. Not for decoding: `step` and what
    calls it, `attention_mask`, `inputs_embeds` and `last_only` raise ValueError. Before `fully_shard`.

    Raises:
        RuntimeError: there is no process group.
    """
    ranks = Ranks.of(group)
    for module in model.modules():
        if isinstance(module, TimeMix):
            module.forward = MethodType(_time_mix, module)  # type: ignore[method-assign]
        if isinstance(module, ChannelMix):
            module.forward = MethodType(_channel_mix, module)  # type: ignore[method-assign]
    model.forward = MethodType(_model_forward(ranks), model)  # type: ignore[method-assign]
    return model


# ---- all of it ----


def parallelize(model: RWKV, mesh: DeviceMesh, mp_policy: MixedPrecisionPolicy | None = None, **fsdp: Any) -> RWKV:
    """The model over the mesh, in place, by the names of its dimensions: "data", "context" and "tensor".

    Args:
        model: With the same parameters on every rank.
        mesh: `init_device_mesh(device_type, sizes, mesh_dim_names=names)`, of one or two of these names; "context" and
            "tensor" not together. "tensor": `tensor_parallel_plan`. "context": `context_parallel`. Over "data" and
            "context" together, which both leave the parameters whole: FSDP2, a block at a time.
        mp_policy: Of FSDP2, but without its cast_forward_inputs: states stay as they are, too coarse otherwise, and
            tokens are integers.
        fsdp: Other arguments of `fully_shard`.

    FSDP2 divides the sum of the ranks' gradients by their number: each rank's loss is then the mean over its own
    tokens, where all ranks have equally many, or else their sum times the ranks over the number of all tokens.

    Raises:
        ValueError: dimensions of the mesh have other names, or cannot be combined.
    """
    names = mesh.mesh_dim_names or ()
    unknown = set(names) - {"data", "context", "tensor"}
    if not names or unknown or {"context", "tensor"} <= set(names):
        raise ValueError(
            f"mesh: expected dimensions named data, context or tensor, the last two not together, got {names or None}"
        )
    if "tensor" in names:
        parallelize_module(model, mesh["tensor"], tensor_parallel_plan())
    if "context" in names:
        context_parallel(model, mesh["context"])
    if whole := tuple(name for name in names if name != "tensor"):
        over = mesh[whole[0]] if len(whole) == 1 else mesh[whole]._flatten()
        policy = replace(mp_policy or MixedPrecisionPolicy(), cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=over, mp_policy=policy, **fsdp)
    return model
