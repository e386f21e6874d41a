"""Hugging Face's RwkvModel on this package's operator, in training and generation, on every device.

    import rwkv_kernels.compat.transformers
    rwkv_kernels.compat.transformers.patch()

Original: `transformers.models.rwkv.modeling_rwkv` of transformers 4.57 to 5.24, with or without its CUDA kernel. Its
decay is raw (`log_decay = -exp(time_decay)`), its WKV state a list of num, den and max, its model state a list of five
[B, C, L] tensors.

Two places of that module are replaced: the function `rwkv_linear_attention`, and the way `RwkvModel.forward` keeps its
state while the layers run. The original lets every layer overwrite its column of the state tensors, which breaks
backward and loses the gradient of a state that was passed; here the layers read what was given and write beside it.
Loading of the original's own kernel is switched off meanwhile, since it would never run. `RwkvForCausalLM.generate`
refuses what it would silently do wrong.

Both models take `cu_seq_lens_q` [N + 1], which DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives:
input_ids are then [1, total], N packed sequences, each as if it ran alone, and states are five [N, C, L]. The original
ignores it. `position_ids` and `seq_idx` are ignored by both.

Deliberate differences:

- Gradients are right for every batch size, and reach a state that was passed. T is not limited.
- One token of several sequences, as in every step of a batched `generate`, is mixed with its own predecessor. The
  original takes the B predecessors for B tokens of each sequence, and returns logits [B, B, V].
- `generate` with a cache refuses beam search, which older versions run on the states of other beams, and guidance, as
  the unconditional sequence has no state; both are right with use_cache=False. It refuses to continue a state with
  use_cache=False, which repeats tokens, or, in older versions, by several tokens, of which these read the last alone.
- Backward works after a call that kept the state (eval mode, use_cache).
- A state that was passed is not modified; the new one is in the output.
- In a float64 model, keys and the WKV state stay float64; the original rounds them to float32.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..functional import wkv
from ..nn import Packing, RWKVState
from .transformers_packed import PackedState, attention, feed_forward

__all__ = [
    "export_model_state",
    "export_state",
    "import_model_state",
    "import_state",
    "patch",
    "patched",
    "rwkv_linear_attention",
    "unpatch",
]


def import_state(state: Sequence[Tensor]) -> Tensor:
    """[num, den, max], each [B, C] -> [B, 3, C], the state of `rwkv_kernels.wkv`; differentiable."""
    if len(state) != 3:
        raise ValueError(
            f"state: expected [num, den, max], got {len(state)} tensors; a model's five [B, C, L] are converted by "
            "rwkv_kernels.compat.transformers.import_model_state"
        )
    return torch.stack(tuple(state), 1)


def export_state(state: Tensor) -> list[Tensor]:
    """[B, 3, C] -> [num, den, max], each [B, C], views of it."""
    return list(state.unbind(1))


def import_model_state(state: Sequence[Tensor]) -> RWKVState:
    """RwkvModel's state, [ffn, att, num, den, max], each [B, C, L] -> `nn.RWKVState`; differentiable."""
    if len(state) != 5 or any(tensor.dim() != 3 for tensor in state):
        shapes = [list(tensor.shape) for tensor in state]
        raise ValueError(f"state: expected five tensors [B, C, L] as RwkvModel returns them, got {shapes}")
    ffn, att, num, den, top = (tensor.movedim(2, 0) for tensor in state)
    return RWKVState(att, ffn, torch.stack((num, den, top), 2))


def export_model_state(state: RWKVState) -> list[Tensor]:
    """`nn.RWKVState` -> RwkvModel's state, which may be passed as its `state`; differentiable."""
    # In memory of its own, because an unpatched model writes to it.
    return [x.movedim(0, 2).clone() for x in (state.ffn_shift, state.att_shift, *state.wkv.unbind(2))]


def rwkv_linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Sequence[Tensor] | None = None,
    return_state: bool = False,
) -> tuple[Tensor, list[Tensor] | None]:
    """transformers' function of the same name, at any T, with every gradient.

    Args:
        time_decay, time_first: [C], the raw decay and the bonus.
        key, value: [B, T, C], of one dtype.
        state: [num, den, max], each [B, C], or None for an empty one.
        return_state: Also return the state where none was passed.

    Returns:
        The output [B, T, C] in key's dtype, and the new state as a list of three, or None.

    Differentiable in all tensors, the returned state included. Raises as `rwkv_kernels.wkv` does.
    """
    given = None if state is None else import_state(state).to(torch.promote_types(key.dtype, torch.float32))
    output, new = wkv(time_decay, time_first, key, value, given, return_state=True)
    return output, export_state(new) if return_state or state is not None else None


class _Columns:
    """One [B, C, L] tensor of a model's state while the layers run: they read what was given and write beside it.

    So nothing that autograd has saved is overwritten, and a layer that runs again for gradient checkpointing reads what
    it read before. With `keep_time` they read [B, 1, C], which is what a single token must be mixed with: a [B, C] is
    broadcast to a sequence of B tokens.
    """

    def __init__(self, given: Tensor, keep_time: bool = False) -> None:
        self._given = given
        self._keep_time = keep_time
        self._written: dict[int, Tensor] = {}

    @staticmethod
    def _layer(index: Any) -> int:
        if isinstance(index, tuple) and len(index) == 3 and index[:2] == (slice(None),) * 2 and type(index[2]) is int:
            return index[2]
        raise RuntimeError(f"transformers' RWKV indexes its state with {index}; this patch knows only [:, :, layer]")

    def __getitem__(self, index: Any) -> Tensor:
        column = self._given[:, :, self._layer(index)]
        return column.unsqueeze(1) if self._keep_time else column

    def __setitem__(self, index: Any, value: Tensor) -> None:
        self._written[self._layer(index)] = value.to(self._given)

    def result(self) -> Tensor:
        layers = range(self._given.shape[2])
        return torch.stack([self._written.get(layer, self._given[:, :, layer]) for layer in layers], 2)


class _WithBoundaries:
    """A state, or None, and boundaries: RwkvForCausalLM.forward passes on the state that it is given, and no others."""

    def __init__(self, state: Any, cu_seqlens: Any) -> None:
        self.state, self.cu_seqlens = state, cu_seqlens


def _hand_on_boundaries(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def replacement(self: Any, *args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        if cu_seq_lens_q is None:
            return forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments["state"] = _WithBoundaries(bound.arguments.get("state"), cu_seq_lens_q)
        return forward(*bound.args, **bound.kwargs)

    return replacement


def _packing(cu_seqlens: Any, embedded: Tensor) -> Packing:
    """The boundaries of the call's tokens; in the words of the operator, which sees them too late."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        found = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seq_lens_q: expected a tensor [N + 1], got {found}")
    if embedded.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q: expected input_ids [1, total] of packed sequences, got {list(embedded.shape[:2])}"
        )
    return Packing.of(cu_seqlens, embedded.shape[1])


def _empty_state(model: Any, embedded: Tensor, sequences: int) -> list[Tensor]:
    """Zeros and the lowest maximum, in the places and dtypes of the original's."""
    config = model.config
    precise = torch.promote_types(embedded.dtype, torch.float32)
    widths = [config.hidden_size] * 2 + [config.attention_hidden_size] * 3
    dtypes = [embedded.dtype] * 2 + [precise] * 3
    state = [
        torch.zeros(sequences, width, config.num_hidden_layers, dtype=dtype, device=embedded.device)
        for width, dtype in zip(widths, dtypes, strict=True)
    ]
    state[4] -= 1e30
    return state


def _keep_state_apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def replacement(self: Any, *args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        arguments = bound.arguments
        state, use_cache = arguments.get("state"), arguments.get("use_cache")
        if isinstance(state, _WithBoundaries):
            state, cu_seq_lens_q = state.state, state.cu_seqlens
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        tokens, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
        keeps_state = state is not None or use_cache
        if (not keeps_state and cu_seq_lens_q is None) or (tokens is None) == (embedded is None):
            return forward(self, *args, **kwargs)
        if embedded is None:
            embedded = self.embeddings(tokens)
        packing = None if cu_seq_lens_q is None else _packing(cu_seq_lens_q, embedded)
        sequences = embedded.shape[0] if packing is None else packing.starts.shape[0]
        given = _empty_state(self, embedded, sequences) if state is None else state
        ends = (sequences, self.config.num_hidden_layers)
        shapes = [list(part.shape) for part in given]
        if len(given) != 5 or any(part.dim() != 3 or part.shape[::2] != ends for part in given):
            raise ValueError(
                f"state: expected five tensors [B, C, L] with B, L = {ends[0]}, {ends[1]} as transformers' RwkvModel "
                f"returns them, got {type(given).__name__} of shapes {shapes}; "
                "rwkv_kernels.compat.transformers.export_model_state converts an nn.RWKVState"
            )
        precise = torch.promote_types(embedded.dtype, torch.float32)
        one_token = packing is None and embedded.shape[1] == 1
        columns = [_Columns(part, keep_time=one_token) for part in given[:2]]
        columns += [_Columns(part.to(precise)) for part in given[2:]]
        passed = columns if packing is None else PackedState(columns, packing)
        arguments |= {"input_ids": None, "inputs_embeds": embedded, "state": passed}
        outputs = forward(*bound.args, **bound.kwargs)
        new = [part.result() for part in columns] if keeps_state else None
        if isinstance(outputs, tuple):
            replaced = (new if part is passed else part for part in outputs)
            return tuple(part for part in replaced if part is not None)
        return dataclasses.replace(outputs, state=new)

    return replacement


def _refuse_what_goes_wrong(prepare_cache: Callable[..., Any]) -> Callable[..., Any]:
    """Of the steps of `generate`, the first that knows both its settings and the model's arguments."""

    @functools.wraps(prepare_cache)
    def replacement(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        model, beams, guidance = type(self).__name__, generation_config.num_beams, generation_config.guidance_scale
        if generation_config.use_cache is False:
            if model_kwargs.get("state") is not None:
                raise ValueError(
                    f"state: {model}.generate cannot continue a state with use_cache=False, which gives it the same "
                    "tokens again at every step; use_cache=True gives the right tokens"
                )
        elif beams is not None and beams > 1:
            raise ValueError(
                f"num_beams={beams}: {model}.generate cannot use beam search with a cache, because its state is not "
                "reordered with the beams; use_cache=False gives the right tokens"
            )
        elif guidance is not None and guidance != 1:
            raise ValueError(
                f"guidance_scale={guidance}: {model}.generate cannot use guidance with a cache, because the "
                "unconditional sequence has no state; use_cache=False gives the right tokens"
            )
        return prepare_cache(self, generation_config, model_kwargs, *args, **kwargs)

    return replacement


def _refuse_a_prompt_after_a_state(prepare_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Where there is a state, the original takes the last token alone, as if all before it were in the state."""

    @functools.wraps(prepare_inputs)
    def replacement(self: Any, input_ids: Tensor, state: Any = None, **kwargs: Any) -> Any:
        unread = kwargs.get("cache_position")
        if state is not None and unread is not None and len(unread) > 1:
            raise ValueError(
                f"state: {type(self).__name__}.generate of this version of transformers reads the last of the "
                f"{len(unread)} tokens alone; pass that one, with a state that has seen the others"
            )
        return prepare_inputs(self, input_ids, state=state, **kwargs)

    return replacement


# Replaced by patch(): (owner, name) -> the original, or None for a name that the owner only inherits.
_originals: dict[tuple[Any, str], Any] = {}


def _modeling() -> ModuleType:
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'rwkv_kernels[transformers]'") from error
    try:
        modeling = importlib.import_module("transformers.models.rwkv.modeling_rwkv")
    except ImportError as error:
        raise ImportError(
            f"transformers {version} has no RWKV (transformers.models.rwkv): use 4.57 to 5.24, or "
            "rwkv_kernels.nn.RWKV, which reads the same checkpoints"
        ) from error
    if faults := _faults(modeling):
        raise RuntimeError(
            f"transformers {version}: its RWKV is not the one that this patch knows, that of 4.57 to 5.24: "
            f"{'; '.join(faults)}. Nothing was changed."
        )
    return modeling


def _faults(modeling: ModuleType) -> list[str]:
    """How the module differs from what the patch relies on."""
    faults = []

    def find(path: str, expected: list[str]) -> Any:
        """The function at the path, if it has at least the expected parameters."""
        function: Any = modeling
        for name in path.split("."):
            function = getattr(function, name, None)
        if not callable(function):
            faults.append(f"{path} is missing")
            return None
        found = list(inspect.signature(function).parameters)
        if found[: len(expected)] != expected:
            faults.append(f"{path} has the parameters {found}, expected {expected}")
        return inspect.unwrap(function)

    wkv_parameters = ["time_decay", "time_first", "key", "value", "state", "return_state"]
    model_parameters = ["self", "input_ids", "attention_mask", "inputs_embeds", "state", "use_cache"]
    find("rwkv_linear_attention", wkv_parameters)
    find("RwkvModel.forward", model_parameters)
    find("RwkvForCausalLM.forward", model_parameters[:5])
    find("RwkvFeedForward.forward", ["self", "hidden", "state"])
    find("RwkvForCausalLM._prepare_cache_for_generation", ["self", "generation_config", "model_kwargs"])
    find("RwkvForCausalLM.prepare_inputs_for_generation", ["self", "input_ids"])
    layer = find("RwkvSelfAttention.forward", ["self", "hidden", "state", "use_cache"])
    if layer is not None and "rwkv_linear_attention" not in layer.__code__.co_names:
        faults.append("RwkvSelfAttention.forward does not call rwkv_linear_attention")
    return faults


def _load_no_kernel(context_length: int) -> None:
    pass


def patch() -> None:
    """Makes every RwkvModel of the installed transformers, present and future, use `rwkv_kernels.wkv`.

    Calling it again changes nothing. `unpatch` undoes it.

    Raises:
        ImportError: transformers is not installed, or has no RWKV.
        RuntimeError: its RWKV is not the one that this patch knows; the message names the differences, and nothing was
            changed.
    """
    if _originals:
        return
    modeling = _modeling()
    inner, outer = modeling.RwkvModel, modeling.RwkvForCausalLM
    replacements = {
        (modeling, "rwkv_linear_attention"): rwkv_linear_attention,
        (modeling, "load_wkv_cuda_kernel"): _load_no_kernel,
        (inner, "forward"): _keep_state_apart(inner.forward),
        (outer, "forward"): _hand_on_boundaries(outer.forward),
        (modeling.RwkvSelfAttention, "forward"): attention(modeling.RwkvSelfAttention.forward),
        (modeling.RwkvFeedForward, "forward"): feed_forward(modeling.RwkvFeedForward.forward),
        (outer, "_prepare_cache_for_generation"): _refuse_what_goes_wrong(outer._prepare_cache_for_generation),
    }
    if "prepare_inputs_for_generation" in vars(outer):
        prepare = outer.prepare_inputs_for_generation
        replacements[outer, "prepare_inputs_for_generation"] = _refuse_a_prompt_after_a_state(prepare)
    for (owner, name), replacement in replacements.items():
        if hasattr(owner, name):
            _originals[owner, name] = vars(owner).get(name)
            setattr(owner, name, replacement)


def unpatch() -> None:
    """Puts back what `patch` replaced; without a patch, changes nothing."""
    while _originals:
        (owner, name), original = _originals.popitem()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextmanager
def patched() -> Iterator[None]:
    """`patch` inside the block; after it, as it was before."""
    before = bool(_originals)
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()
