"""The operators as torch sees them, beyond their kernels: shapes, derivatives, vmap and autocast.

`attach` gives all of it to one forward and backward pair. The derivative is an autograd.Function behind the operator's
Autograd key, and not torch.library.register_autograd, because the latter's functions work under neither torch.func.grad
nor forward-mode AD: the first raises, the second returns zeros.

A call that nothing traces takes a shorter way: the same derivative from an autograd.Function of the old form, and the
operator below its Autograd key. The rest of the way is Python, three times the price of the operator for a small call:
every pass through the key calls back into Python, and a Function with setup_context binds its arguments by inspection.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# By name, because looking them up is a part of every call's latency.
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _is_fwd_grad_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .inputs import (
    ADJOINT_SUMMARY,
    BACKWARD,
    BI_BACKWARD,
    BI_FORWARD,
    BOUNDARY_DTYPES,
    FORWARD,
    MIXING_BACKWARD,
    MIXING_FORWARD,
    STEP,
    SUMMARY,
    BiInputs,
    Inputs,
)
from .reference import state_dtype

__all__ = ["attach", "attach_bi", "define", "define_bi", "define_summaries", "refuse_onnx", "untraced"]

Outputs = tuple[Tensor, ...]
Differentiable = Callable[..., Any]
Form = type[Inputs] | type[BiInputs]
_FUNCTIONS: dict[Form, str] = {Inputs: "wkv", BiInputs: "bi_wkv"}

# Of every device type that torch has autocast for.
AUTOCAST_KEYS = [key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast")]
AUTOCAST = functools.reduce(lambda a, b: a | b, map(torch._C.DispatchKeySet, AUTOCAST_KEYS))


def refuse_onnx() -> None:
    """Raises while torch.onnx exports."""
    # Only its users have it imported, so that most calls ask nothing more.
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "ONNX has no operator for the compiled backends of wkv: export under "
            "rwkv_kernels.use_backend('reference'), which writes the steps of the example one by one"
        )


def _refusals(function: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions that raise in place of a second derivative, and of a forward-mode one."""

    def second_derivative(ctx: Any, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(
            f"{function} has no second derivative in its compiled backends; backend='reference' is differentiable to "
            "any order"
        )

    def forward_mode(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError(
            f"{function} has no forward-mode derivative (jvp) in its compiled backends; backend='reference' is "
            "differentiable in either mode"
        )

    return second_derivative, forward_mode


def _needs_derivative(arguments: Iterable[Tensor | None]) -> bool:
    if forward_ad._current_level >= 0 and _is_fwd_grad_enabled():
        return True
    if torch.is_grad_enabled():
        for x in arguments:  # not any() of a generator, for the latency of every call
            if x is not None and x.requires_grad:
                return True
    return False


def _below_autograd(operator: OpOverload, *arguments: Any) -> Any:
    with _AutoDispatchBelowAutograd():
        return operator(*arguments)


def untraced() -> bool:
    """Whether this call is run and not also recorded or transformed: by torch.compile, jit, torch.func, or a mode."""
    return not (is_compiling() or _is_tracing() or _are_functorch_transforms_active() or _len_torch_dispatch_stack())


def _define_functions(forward: OpOverload, backward: OpOverload, form: Form) -> tuple[Any, Any, Any]:
    """The derivative of backward, which raises; of forward; and of forward in calls that nothing traces."""
    refuse_second_derivative, refuse_forward_mode = _refusals(_FUNCTIONS[form])

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Tensor | None) -> Outputs:
            return backward(*arguments)  # type: ignore[no-any-return]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Outputs) -> None:
            pass

        backward = staticmethod(refuse_second_derivative)
        jvp = staticmethod(refuse_forward_mode)

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor | None) -> Outputs:
            return forward(*inputs, True)  # type: ignore[no-any-return]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Outputs) -> None:
            checkpoints = output[-1]
            ctx.mark_non_differentiable(checkpoints)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, checkpoints)

        @staticmethod
        def backward(ctx: Any, gy: Tensor | None, *others: Tensor | None) -> Any:
            """`others` is the gradient of the state, if any, and None for the checkpoints."""
            *inputs, checkpoints = ctx.saved_tensors
            if gy is None:
                gy = torch.zeros_like(form(*inputs).k)
            call: Any = backward  # in general: its Autograd key refuses a second derivative
            if _are_functorch_transforms_active():
                call = Backward.apply
            elif untraced() and not torch.is_grad_enabled():
                call = functools.partial(_below_autograd, backward)
            gradients = (*call(*inputs, checkpoints, gy, *others[:-1]), None)[: len(inputs)]  # None is of cu_seqlens
            return tuple([None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)])

        jvp = staticmethod(refuse_forward_mode)

    class Untraced(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor | None) -> Outputs:
            outputs: Outputs = _below_autograd(forward, *inputs, True)
            Forward.setup_context(ctx, inputs, outputs)
            return outputs

        backward = staticmethod(Forward.backward)
        jvp = staticmethod(refuse_forward_mode)

    return Backward, Forward, Untraced


def define(
    library: torch.library.Library,
    name: str,
    device_type: str,
    forward: Callable[..., Outputs],
    backward: Callable[..., Outputs],
    step: Callable[..., Tensor] | None = None,
) -> None:
    """Defines the operators of a backend in Python: those of `_pairs(name)`, and `name`_step.

    `forward` and `backward` get five inputs from the plain operators and seven from the mixing ones.
    """
    operators: list[tuple[str, str, Callable[..., Any]]] = []
    schemas = ((FORWARD, BACKWARD), (MIXING_FORWARD, MIXING_BACKWARD))
    for (forward_name, backward_name), (forward_schema, backward_schema) in zip(_pairs(name), schemas, strict=True):
        operators += ((forward_name, forward_schema, forward), (backward_name, backward_schema, backward))
    if step is not None:
        operators.append((f"{name}_step", STEP, step))
    _define(library, device_type, operators)


def define_summaries(
    library: torch.library.Library,
    name: str,
    device_type: str,
    summary: Callable[..., Tensor],
    adjoint_summary: Callable[..., Tensor],
) -> None:
    """Defines the operators of summaries of a backend in Python, which nothing traces or differentiates."""
    operators = (f"_{name}_summary", SUMMARY, summary), (f"_{name}_adjoint_summary", ADJOINT_SUMMARY, adjoint_summary)
    _define(library, device_type, operators)


def define_bi(
    library: torch.library.Library,
    name: str,
    device_type: str,
    forward: Callable[..., Outputs],
    backward: Callable[..., Outputs],
) -> None:
    """Defines the bidirectional operators of a backend in Python."""
    operators = (f"{name}_forward", BI_FORWARD, forward), (f"_{name}_backward", BI_BACKWARD, backward)
    _define(library, device_type, operators)


def _define(
    library: torch.library.Library, device_type: str, operators: Iterable[tuple[str, str, Callable[..., Any]]]
) -> None:
    for operator, schema, function in operators:
        library.define(operator + schema)
        library.impl(operator, function, torch._C._dispatch_key_for_device(device_type))


def _pairs(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """The operators forward and backward of that name: the plain ones, and those with a gate and packed sequences."""
    return (f"{name}_forward", f"_{name}_backward"), (f"{name}_mixing_forward", f"_{name}_mixing_backward")


def attach(
    library: torch.library.Library, name: str, checkpoint_interval: Callable[[torch.dtype], int]
) -> tuple[Differentiable, OpOverload | None]:
    """Registers fake kernels, autograd, vmap and autocast for the operators of that name.

    Returns the differentiable function (w, u, k, v, state, r, cu_seqlens) -> (y, state_out), and the operator of a
    step, if any.
    """
    ops = getattr(torch.ops, library.ns)
    pairs = ((getattr(ops, forward).default, getattr(ops, backward).default) for forward, backward in _pairs(name))
    plain, mixing = (_attach_pair(library, *pair, checkpoint_interval, Inputs) for pair in pairs)
    step: OpOverload | None = getattr(ops, f"{name}_step").default if hasattr(ops, f"{name}_step") else None
    if step is not None:
        torch.library.register_fake(step._schema.name, _fake_step, lib=library)

    def differentiable(
        w: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        r: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        if r is None and cu_seqlens is None:
            return plain(w, u, k, v, state)
        return mixing(w, u, k, v, state, r, cu_seqlens)

    return differentiable, step


def attach_bi(
    library: torch.library.Library, name: str, checkpoint_interval: Callable[[torch.dtype], int]
) -> Differentiable:
    """Does as much for the bidirectional operators of that name.

    Returns the differentiable function (log_decay, u, k, v, r, cu_seqlens) -> y.
    """
    ops = getattr(torch.ops, library.ns)
    forward, backward = getattr(ops, f"{name}_forward").default, getattr(ops, f"_{name}_backward").default
    pair = _attach_pair(library, forward, backward, checkpoint_interval, BiInputs)

    def differentiable(*inputs: Tensor | None) -> Tensor:
        (y,) = pair(*inputs)
        return y  # type: ignore[no-any-return]

    return differentiable


def _attach_pair(
    library: torch.library.Library,
    forward: OpOverload,
    backward: OpOverload,
    checkpoint_interval: Callable[[torch.dtype], int],
    form: Form,
) -> Differentiable:
    """Does so for one pair of operators, whose inputs are the arguments of the function that it returns.

    The function returns the outputs of forward but for the checkpoints.
    """
    forward_name, backward_name = forward._schema.name, backward._schema.name
    BackwardFunction, ForwardFunction, UntracedFunction = _define_functions(forward, backward, form)

    # ---- shapes ----

    @torch.library.register_fake(forward_name, lib=library)
    def fake_forward(*arguments: Any) -> Outputs:
        refuse_onnx()  # here for torch.export, which compiles the question away where the backend is chosen
        *inputs, checkpoint = arguments
        given = form(*inputs)
        B, rows, *state = given.checkpoint_shape(checkpoint_interval(given.k.dtype))
        saved = given.k.new_empty((B, rows if checkpoint else 0, *state), dtype=state_dtype(given.k.dtype))
        return (*(x.new_empty(x.shape) for x in given.results(saved)), saved)

    @torch.library.register_fake(backward_name, lib=library)
    def fake_backward(*arguments: Any) -> Outputs:
        given = len(forward._schema.arguments) - 1
        gradients = form(*arguments[:given]).gradients(arguments[given])
        return tuple(x.new_empty(x.shape) for x in gradients[: len(backward._schema.returns)])

    # ---- derivatives ----

    def forward_autograd(*arguments: Any) -> Outputs:
        inputs, checkpoint = arguments[:-1], arguments[-1]
        if not _needs_derivative(inputs):
            with _AutoDispatchBelowAutograd():
                return forward(*arguments)  # type: ignore[no-any-return]
        # torch.func follows an autograd.Function from outside, but not from inside an operator.
        if _are_functorch_transforms_active():
            raise NotImplementedError(f"torch.func transforms do not reach inside {forward_name}: use rwkv_kernels.wkv")
        *results, checkpoints = ForwardFunction.apply(*inputs)
        return *results, checkpoints if checkpoint else checkpoints[:, :0].clone()

    def backward_autograd(*arguments: Tensor | None) -> Outputs:
        if not _needs_derivative(arguments):
            return _below_autograd(backward, *arguments)  # type: ignore[no-any-return]
        return BackwardFunction.apply(*arguments)  # type: ignore[no-any-return]

    library.impl(forward, forward_autograd, "Autograd")
    library.impl(backward, backward_autograd, "Autograd")

    # ---- vmap: the mapped dimension joins the channels, which are independent of one another ----

    def join_channels(x: Any, dim: int | None, size: int) -> Any:
        if not isinstance(x, Tensor) or (dim is None and x.dtype in BOUNDARY_DTYPES):
            return x
        if x.dtype in BOUNDARY_DTYPES:
            raise NotImplementedError("cu_seqlens: vmap over boundaries is not supported: all samples must share them")
        mapped = x.unsqueeze(-2).expand(*x.shape[:-1], size, x.shape[-1]) if dim is None else x.movedim(dim, -2)
        return mapped.flatten(-2)

    def register_vmap(operator: OpOverload) -> None:
        @torch.library.register_vmap(operator._schema.name, lib=library)
        def vmapped(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Outputs, tuple[int, ...]]:
            size, w, w_dim = info.batch_size, arguments[0], in_dims[0]
            outputs = operator(*(join_channels(x, dim, size) for x, dim in zip(arguments, in_dims, strict=True)))
            channels = w.shape[-1] if w_dim is None else w.shape[1 - w_dim]
            return tuple(x.unflatten(-1, (size, channels)).movedim(-2, 0) for x in outputs), (0,) * len(outputs)

    register_vmap(forward)
    register_vmap(backward)

    # ---- autocast: all sums are float32 anyway, so k and v only have to agree, and the wider one decides ----

    def forward_autocast(*arguments: Any) -> Outputs:
        *inputs, checkpoint = arguments
        given = form(*inputs)
        r, dtype = given.r, torch.promote_types(given.k.dtype, given.v.dtype)
        if r is not None:
            dtype = torch.promote_types(dtype, r.dtype)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            cast = given._replace(k=given.k.to(dtype), v=given.v.to(dtype), r=None if r is None else r.to(dtype))
            return forward(*cast[: len(inputs)], checkpoint)  # type: ignore[no-any-return]

    for key in AUTOCAST_KEYS:
        library.impl(forward, forward_autocast, key.name)

    def differentiable(*inputs: Tensor | None) -> Outputs:
        refuse_onnx()
        if untraced():
            if _needs_derivative(inputs):
                outputs = UntracedFunction.apply(*inputs)
            else:
                with _AutoDispatchBelowAutograd():
                    outputs = forward(*inputs, False)
        elif _are_functorch_transforms_active():
            outputs = ForwardFunction.apply(*inputs)
        else:
            outputs = forward(*inputs, False)
        return outputs[:-1]  # type: ignore[no-any-return]

    return differentiable


def _fake_step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, r: Tensor | None = None) -> Tensor:
    """Refuses a state whose place in memory torch.compile would lose."""
    refuse_onnx()
    if state._is_view() and isinstance(state.storage_offset(), torch.SymInt):
        raise NotImplementedError(
            "state: expected a tensor whose place in memory is known to the compiler, got a view at an offset that "
            "depends on a size: torch.compile loses it where a custom operator mutates the view; use "
            "rwkv_kernels.wkv_step"
        )
    return torch.empty_like(k, memory_format=torch.contiguous_format)
