"""RWKV-4, the language model, in torch on top of `rwkv_kernels.wkv`.

All that a layer remembers is the last input of each mixing and the WKV state, so the same weights run over a whole
sequence or token by token.

Source: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048).
"""

import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..functional import empty_state
from . import checkpoints
from .layers import Block, narrow_embedding, orthogonal_linear
from .packing import Packing, Padding
from .sampling import Generators, sample
from .state import RWKVState

__all__ = ["RWKV"]


class RWKV(nn.Module):
    """The RWKV-4 language model.

    `load_state_dict` takes a published RWKV-4 checkpoint as it is; `from_state_dict` also reads the sizes off it, and
    `from_pretrained` reads it from disk in any of the formats in use. Every module resets its own parameters, so that a
    model made on the meta device gets its initial values by `to_empty` and `reset_parameters` of all its `modules()`.
    The backend is chosen by `rwkv_kernels.use_backend`.

    Args:
        vocab_size: V, how many tokens there are.
        channels: C, the width of the residual stream.
        layers: L.
        hidden: F, the inner width of the channel mixing; None for 4 C.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, vocab_size: int, channels: int, layers: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * channels if hidden is None else hidden
        if min(vocab_size, channels, layers, hidden) < 1:
            raise ValueError(f"sizes: expected positive numbers, got {vocab_size=}, {channels=}, {layers=}, {hidden=}")
        self.emb = narrow_embedding(vocab_size, channels)
        self.blocks = nn.ModuleList(Block(channels, hidden, layer, layers) for layer in range(layers))
        self.ln_out = nn.LayerNorm(channels)
        self.head = orthogonal_linear(channels, vocab_size, gain=0.5 * max(1.0, vocab_size / channels) ** 0.5)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "RWKV":
        """A model of the state dict's sizes, dtypes and devices, holding copies of its tensors.

        Raises:
            ValueError: keys are missing or unknown, shapes do not fit, or they are those of another version of RWKV;
                the message names all of them.
        """
        return cls._holding({name: tensor.detach().clone() for name, tensor in state_dict.items()})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, rescaled: bool = False) -> "RWKV":
        """A model from a published checkpoint on disk, in the checkpoint's dtypes, on the CPU.

        Args:
            path: A file of RWKV-LM (`.pth`) or of safetensors, with RWKV-LM's or transformers' names, or a folder that
                transformers wrote: `config.json` with `model.safetensors` or `pytorch_model.bin`, in one file or in
                several with an index. Tied embeddings, and whatever else shares memory, become matrices of their own.
            rescaled: Undo what transformers does to its layers in eval mode, which it also writes to disk:
                `model.rwkv.layers_are_rescaled` at the time when the folder was written. Published folders are not
                rescaled. Without it, weights that look rescaled give a warning.

        Only tensors are read: nothing that a file contains is executed, nothing is downloaded.

        Raises:
            FileNotFoundError: the path, or what a folder must contain, is not there.
            ValueError: a file is broken or holds more than tensors; or it is the checkpoint of another model, as in
                `from_state_dict`.
            ImportError: a safetensors file, and safetensors is not installed.
        """
        return cls._holding(checkpoints.load(checkpoints.path_of(path), rescaled), f"{path}")

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes what `from_pretrained` reads, in the format that the path asks for.

        `.pth` or `.pt` and `.safetensors` give a file with RWKV-LM's names, any other path a folder for transformers.
        Tied embeddings are written as two matrices.

        Raises:
            ImportError: safetensors is needed and not installed.
        """
        checkpoints.save(Path(path), self.state_dict())

    @classmethod
    def _holding(cls, tensors: dict[str, Tensor], source: str = "state dict") -> "RWKV":
        """A model of these very tensors."""
        if version := checkpoints.other_version(tensors):
            raise ValueError(f"{source}: expected a checkpoint of RWKV-4, got one of {version}")
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        for name in ("emb.weight", "blocks.0.ffn.key.weight"):
            if len(shapes.get(name, ())) != 2:
                found = shapes.get(name, f"none among {', '.join(sorted(shapes)[:5]) or 'no tensors'}")
                raise ValueError(f"{source}: expected a matrix {name!r}, got {found}")
        (vocab_size, channels), hidden = shapes["emb.weight"], shapes["blocks.0.ffn.key.weight"][0]
        layers = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
        # The meta device has shapes without values, so nothing is allocated or initialised only to be replaced.
        with torch.device("meta"):
            model = cls(vocab_size, channels, layers, hidden)
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
        faults += [f"unknown {name}" for name in shapes if name not in expected]
        faults += [
            f"{name}: expected shape {shape}, got {shapes[name]}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ]
        faults += [
            f"{name}: expected floating-point numbers, got {tensor.dtype}"
            for name, tensor in tensors.items()
            if name in expected and not tensor.is_floating_point()
        ]
        if faults:
            raise ValueError(f"{source} does not fit an RWKV-4 model of {layers} layers: {'; '.join(faults)}")
        model.load_state_dict(tensors, assign=True)
        return model

    def empty_state(self, batch: int, *, device: torch.device | str | None = None) -> RWKVState:
        """The state before the first token, for `batch` sequences, on the device, by default that of the weights."""
        # The weight may be a DTensor, whose new_zeros would be another.
        weight, layers, channels = self.emb.weight, len(self.blocks), self.emb.embedding_dim
        device = weight.device if device is None else device
        wide = torch.promote_types(weight.dtype, torch.float32)
        return RWKVState(
            torch.zeros(layers, batch, channels, device=device, dtype=weight.dtype),
            torch.zeros(layers, batch, channels, device=device, dtype=weight.dtype),
            empty_state(layers * batch, channels, device=device, dtype=wide).view(layers, batch, 3, channels),
        )

    def _check_state(self, state: RWKVState, sequences: int) -> None:
        _check_is_state(state)
        L, N, C = len(self.blocks), sequences, self.emb.embedding_dim
        for name, tensor, shape in zip(state._fields, state, ((L, N, C), (L, N, C), (L, N, 3, C)), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"state.{name}: expected shape {list(shape)}, got {list(tensor.shape)}")

    def _checked_inputs(self, tokens: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Whichever of the two is given: tokens [B, T] or embeddings [B, T, C]."""
        if isinstance(tokens, torch.fx.Proxy):
            raise TypeError(
                "torch.fx.symbolic_trace cannot follow a whole model; torch.export and torch.compile can, and fx its "
                "blocks with concrete_args={'packing': None, 'in_place': False}"
            )
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError(f"expected either tokens or inputs_embeds, got {'neither' if tokens is None else 'both'}")
        if inputs_embeds is None:
            return _checked_tokens(tokens, ("B", "T"))
        weight = self.emb.weight
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != weight.shape[1]:
            raise ValueError(
                f"inputs_embeds: expected shape [B, T, C] with C = {weight.shape[1]}, got {list(inputs_embeds.shape)}"
            )
        if inputs_embeds.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise ValueError(f"inputs_embeds: expected {weight.dtype} as the embeddings, got {inputs_embeds.dtype}")
        return inputs_embeds

    def forward(
        self,
        tokens: Tensor | None = None,
        state: RWKVState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        last_only: bool = False,
        in_place: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, RWKVState]:
        """The logits of every next token.

        Args:
            tokens: [B, T], int64; None where `inputs_embeds` is given.
            state: As an earlier call returned it, of a model of any dtype, or None for an empty one. It is not
                modified.
            attention_mask: [B, T], bool or integer: 0 for a place that is padding, left or right or between, where
                tokens may be any number. None if every place counts.
            inputs_embeds: [B, T, C], in the dtype of `emb.weight`: what to run on in place of `emb(tokens)`, for soft
                prompts and other modalities.
            last_only: Compute the logits after each sequence's last token alone.
            in_place: For decoding: `state.wkv` may be overwritten, and then is the one that is returned. An eager call
                of one token does so, and is not differentiable.
            cu_seqlens: [N + 1], int32 or int64, for N packed sequences: tokens are [1, total], and sequence n has those
                from cu_seqlens[n] to cu_seqlens[n + 1] - 1. The state is that of N sequences, before and after the
                call. `cu_seqlens_of` makes it from a batch.

        Returns:
            logits [B, T, V], or [B, 1, V] with `last_only`, and the state after the last token, which continues the
            sequences as if they had never been cut. Both are differentiable, also through the state. Every sequence
            gives what it gives alone and without its padding; logits in the padding are zero. Packed sequences have
            logits [1, total, V], or [N, 1, V] with `last_only`. A sequence without tokens hands its state on, and its
            logits with `last_only` are zero.

        Neither mask nor cu_seqlens is read on the host where they are on a GPU: other lengths need no other graph.

        Raises:
            ValueError: tokens, embeddings, mask, cu_seqlens or state have the wrong shape or type, or tokens are not
                int64; both or neither of tokens and embeddings are given, or both of mask and cu_seqlens.
            TypeError: tokens or cu_seqlens are no tensor or of another dtype, or the WKV state has a 16-bit dtype.
        """
        inputs = self._checked_inputs(tokens, inputs_embeds)
        packing, padding, sequences = None, None, inputs.shape[0]
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ValueError("expected either attention_mask or cu_seqlens, got both")
            sequences = _checked_cu_seqlens(cu_seqlens, inputs).shape[0] - 1
        elif attention_mask is not None:
            attention_mask = _checked_mask(attention_mask, inputs)
        if state is not None:
            self._check_state(state, sequences)
        given: Sequence[RWKVState | None] = [None] * len(self.blocks)
        if cu_seqlens is not None:
            packing = Packing.of(cu_seqlens, inputs.shape[1])
        elif attention_mask is not None:
            padding = Padding.of(attention_mask)
            packing, inputs = padding.packing, padding.pack(inputs)
        if state is not None:
            whole = state if padding is None else padding.with_padding(state)
            given = [RWKVState(*layer) for layer in zip(*(tensor.unbind() for tensor in whole), strict=True)]
        x = self.emb(inputs) if inputs_embeds is None else inputs
        new: list[RWKVState] = []
        for block, layer_state in zip(self.blocks, given, strict=True):
            x, layer_state = block(x, layer_state, packing, in_place)
            new.append(layer_state)
        x = self.ln_out(x)
        if packing is not None and last_only:
            x = packing.last(x)[:sequences]
        elif padding is not None:
            x = padding.unpack(x)
        elif last_only:
            x = x[:, -1:]
        if padding is not None:
            new = [RWKVState(*(tensor[:sequences] for tensor in layer)) for layer in new]
        att_shift, ffn_shift, wkv = zip(*new, strict=True)
        moved = in_place and all(layer and x is layer.wkv for x, layer in zip(wkv, given, strict=True))
        wkv_state = state.wkv if moved and state is not None else torch.stack(wkv)
        return self.head(x), RWKVState(torch.stack(att_shift), torch.stack(ffn_shift), wkv_state)

    def step(self, tokens: Tensor, state: RWKVState) -> Tensor:
        """One token of each sequence, for decoding: the state moves on in place.

        Every module is called as in `forward`, by hooks and wrappers, too.

        Args:
            tokens: [B], int64.
            state: Overwritten by the state after the token.

        Returns:
            logits [B, V].

        Not differentiable: call it under torch.no_grad().

        Raises:
            ValueError, TypeError: as for `forward`, also if a gradient would be required.
        """
        _checked_tokens(tokens, ("B",))
        _check_is_state(state)
        logits, after = self(tokens.unsqueeze(1), state, in_place=True)
        if any(tensor.requires_grad for tensor in after):
            raise ValueError("state: expected no gradient to be required by step (use torch.no_grad(), or forward)")
        # The shifts did not move in place, and nothing did where a compiler or a wrapper stands between.
        for old, moved in zip(state, after, strict=True):
            if moved is not old:
                old.copy_(moved)
        return cast(Tensor, logits.squeeze(1))

    def stream(
        self,
        tokens: Tensor | None,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        state: RWKVState | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_tokens: Collection[int] | int = (),
        generator: Generators = None,
        inputs_embeds: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Continues the sequences: the prompt in parallel, then token by token, in memory that does not grow.

        Gradients and inference mode are off inside, whatever mode the caller is in when it asks for a token.

        Args:
            tokens: [B, T], int64: the prompts, at least one token each; None where `inputs_embeds` is given.
            max_new_tokens: How many tokens to append at most.
            attention_mask: [B, T], as for `forward`, for prompts of different length.
            state: What came before the prompts, as an earlier call returned it. It is not modified.
            temperature: Divides the logits; 0 takes the likeliest token every time.
            top_p: Samples among the likeliest tokens that together have at least this probability.
            stop_tokens: A sequence that has got one of them, or it if it is a single one, is finished, and repeats it
                from then on.
            generator: The source of randomness: None for torch's global one, one generator, or one for each sequence,
                whose tokens then do not depend on the batch that it is in.
            inputs_embeds: [B, T, C], as for `forward`: prompts in place of `tokens`.

        Yields:
            [B], the next token of every sequence, until all of them are finished or max_new_tokens is reached.

        Raises:
            ValueError: an empty prompt, an argument of the wrong shape, type or number, max_new_tokens or temperature
                below 0, or top_p outside (0, 1].
        """
        inputs = self._checked_inputs(tokens, inputs_embeds)
        filled = inputs.shape[1] > 0
        if attention_mask is not None:
            filled = bool(_checked_mask(attention_mask, inputs).any(1).all())
        if not filled:
            raise ValueError("tokens: expected a prompt of at least one token, got an empty one")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
        if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != inputs.shape[0]:
            raise ValueError(f"generator: expected one for each of {inputs.shape[0]} sequences, got {len(generator)}")
        stops = [stop_tokens] if isinstance(stop_tokens, int) else sorted(stop_tokens)
        stop = torch.tensor(stops, dtype=torch.int64, device=inputs.device)
        prompt = functools.partial(self, tokens, state, attention_mask, inputs_embeds=inputs_embeds, last_only=True)
        return self._stream(prompt, max_new_tokens, temperature, top_p, stop, generator)

    # The state of a stream lives as long as its generator, and a tensor made in inference mode could not be written to
    # outside of it. Turning inference mode off turns gradients on, so the order of the two matters.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _stream(
        self,
        prompt: Callable[[], tuple[Tensor, RWKVState]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Tensor,
        generator: Generators,
    ) -> Iterator[Tensor]:
        if max_new_tokens == 0:
            return
        logits, state = prompt()
        logits = logits.squeeze(1)
        chosen = finished = None
        for left in reversed(range(max_new_tokens)):
            token = sample(logits, temperature, top_p, generator)
            if chosen is not None and finished is not None:
                token = torch.where(finished, chosen, token)
            chosen = token
            yield chosen
            if len(stop):
                finished = torch.isin(chosen, stop)
            if left == 0 or (finished is not None and bool(finished.all())):
                return
            logits = self.step(chosen, state)

    def generate(
        self,
        tokens: Tensor | None,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        state: RWKVState | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_tokens: Collection[int] | int = (),
        generator: Generators = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The prompts and what `stream` yields for them.

        Args: as for `stream`.

        Returns:
            [B, T + n], n the number of steps until all sequences were finished, or max_new_tokens; [B, n] after prompts
            that were given as `inputs_embeds`.

        Raises:
            ValueError: as `stream` does.
        """
        new = self.stream(
            tokens,
            max_new_tokens,
            attention_mask=attention_mask,
            state=state,
            temperature=temperature,
            top_p=top_p,
            stop_tokens=stop_tokens,
            generator=generator,
            inputs_embeds=inputs_embeds,
        )
        if inputs_embeds is not None:
            tokens = torch.empty(inputs_embeds.shape[0], 0, dtype=torch.int64, device=inputs_embeds.device)
        return torch.cat((cast(Tensor, tokens), *(token.unsqueeze(1) for token in new)), 1)


def _check_is_state(state: object) -> None:
    if not isinstance(state, RWKVState):
        raise ValueError(
            f"state: expected an RWKVState, got {type(state).__name__}; import_model_state of "
            "rwkv_kernels.compat.transformers, .blinkdl, .infctx or .rwkv_pip converts that library's states"
        )


def _checked_tokens(tokens: object, shape: tuple[str, ...]) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a torch.Tensor, got {type(tokens).__name__}")
    if tokens.dim() != len(shape):
        raise ValueError(f"tokens: expected shape [{', '.join(shape)}], got {list(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected torch.int64, got {tokens.dtype}")
    return tokens


def _checked_mask(mask: Tensor, inputs: Tensor) -> Tensor:
    """The mask as booleans."""
    if mask.shape != inputs.shape[:2]:
        raise ValueError(f"attention_mask: expected shape {list(inputs.shape[:2])} as tokens, got {list(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"attention_mask: expected booleans or integers, 0 for padding, got {mask.dtype}")
    return mask.bool()


def _checked_cu_seqlens(cu_seqlens: object, inputs: Tensor) -> Tensor:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != inputs.device:
        raise ValueError(f"cu_seqlens: expected device {inputs.device} as tokens, got {cu_seqlens.device}")
    if inputs.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected tokens [1, total] of packed sequences, got {list(inputs.shape)}")
    return cu_seqlens
