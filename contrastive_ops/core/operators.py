"""How operators are defined: the library, and what every one of them has beside its function.

Not torch.library.custom_op, whose first call imports torch._dynamo: three seconds and 150 MiB for a plain evaluation.

An eager call does not go through the dispatcher, whose wrapper in Python costs more than a small batch: `call` has a
function for each operator, which takes the registered operator wherever somebody beside autograd would see the call.

What torch.library leaves out is added here, for all operators at once: forward-mode differentiation is refused where
torch.library would return zero, `torch.func.grad` and its relatives run the derivative that is registered, and
`torch.func.vmap` runs an operator once for each entry of the batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import eager


class _Library(torch.library.Library):
    """A library whose derivatives go through `_guarded` first."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        """Register a kernel."""
        if dispatch_key == "Autograd" and isinstance(op_name, str):
            fn = _guarded(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)


LIBRARY = _Library("contrastive_ops", "FRAGMENT")
_PACKAGE = f"{__name__.partition('.')[0]}."
# The derivatives of operators as autograd.Functions for the transforms of torch.func.
_TRANSFORMED: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    derivative: Callable[..., Any] | None = None,
    in_cpp: Callable[..., Any] | None = None,
) -> None:
    """Define contrastive_ops::name for all devices; without `derivative` it has none.

    `in_cpp`, of contrastive_ops._eager, does the same for eager calls with autograd, or returns None.
    """
    qualified = f"contrastive_ops::{name}"
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, _without_grad_mode(function), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    operator = getattr(torch.ops.contrastive_ops, name).default
    if derivative is not None and setup is not None:
        _TRANSFORMED[name] = _transformed(operator, setup, derivative)
        torch.library.register_autograd(qualified, derivative, setup_context=setup, lib=LIBRARY)
    else:
        LIBRARY.impl(name, _without_derivative(operator), "Autograd", with_keyset=True)
    torch.library.register_vmap(qualified, _one_by_one(operator), lib=LIBRARY)
    setattr(call, name, _direct(name, operator, function, setup, derivative, in_cpp))


# ---- Eager calls ---------------------------------------------------------------------------------------------------


class _Calls:
    """A function for each operator, by its name."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"contrastive_ops has no operator {name}")


call: Any = _Calls()

_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _one_requires_grad(*arguments: Any) -> bool:
    parts = (each for given in arguments for each in (given if isinstance(given, list) else (given,)))
    return any(isinstance(each, Tensor) and each.requires_grad for each in parts)


# Older releases have none.
_any_requires_grad = getattr(torch._C, "_any_requires_grad", _one_requires_grad)


def seen_by_autograd_alone(arguments: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments may leave out the dispatcher.

    No mode, transform, tracer, profiler or forward-mode derivative is active, and every tensor is a plain one.
    """
    if _dispatch_modes() or _function_modes() or _transforms() is not None or _tracing() is not None:
        return False
    if _profiling() or forward_ad._current_level >= 0:
        return False
    for argument in arguments:
        for each in argument if isinstance(argument, list) else (argument,):
            if type(each) in _PLAIN:
                # A transform's wrapper outlives it in what was saved for the pullback of torch.func.vjp.
                if each.is_meta or each.is_neg() or _is_wrapped(each):
                    return False
            elif isinstance(each, Tensor):
                return False
    return True


def _direct(
    name: str,
    operator: Any,
    function: Callable[..., Any],
    setup: Callable[..., None] | None,
    derivative: Callable[..., Any] | None,
    in_cpp: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """`operator`, or what it would do where nobody sees the difference."""
    below_autograd = _without_grad_mode(function)

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function(*arguments)
        setup(ctx, arguments, output)  # type: ignore[misc]
        return output

    def backward(ctx: Any, *gradients: Any) -> Any:
        found = derivative(ctx, *gradients)  # type: ignore[misc]
        if isinstance(found, tuple):  # for a list of tensors a Function takes None alone
            return tuple(None if isinstance(gradient, list) else gradient for gradient in found)
        return found

    # Made here and not by a class statement, so that the node in a graph has the operator's name.
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    apply = type(name, (torch.autograd.Function,), parts).apply  # type: ignore[attr-defined]

    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*arguments)
        if in_cpp is not None and eager.is_open() and (found := in_cpp(*arguments)) is not None:
            return found
        if not seen_by_autograd_alone(arguments):
            return operator(*arguments)
        if derivative is not None and torch.is_grad_enabled() and _any_requires_grad(*arguments):
            return apply(*arguments)
        return below_autograd(*arguments)

    return run


def _without_grad_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with grad mode off: below autograd it says nothing, and the reference would keep its chunks."""

    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments)
        with torch.no_grad():
            return function(*arguments)

    return run


# ---- Forward mode and the transforms of torch.func -------------------------------------------------------------------


def _guarded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, except for what it would get wrong."""

    def run(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        if torch._C._are_functorch_transforms_active() and name in _TRANSFORMED:
            return _TRANSFORMED[name](keyset, *arguments)
        return kernel(keyset, *arguments)

    return run


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        for each in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None:
                raise NotImplementedError(
                    f"{_function_called() or name}: inputs must have no forward-mode tangents (torch.func.jvp, jacfwd, "
                    "hessian, dual_level), got some: no operator of contrastive_ops has that derivative\n"
                    "  torch.autograd.functional.jvp computes the same by reverse mode; Jacobians and Hessians come "
                    "from torch.func.jacrev"
                )


def _function_called() -> str | None:
    """The outermost function of the package that is running: the one that the user knows."""
    frame, found = inspect.currentframe(), None
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        function = frame.f_globals.get(name)  # not of methods, nor of functions within functions
        is_public = module.startswith(_PACKAGE) and not (module.startswith(f"{_PACKAGE}testing.") or name[0] == "_")
        if is_public and getattr(function, "__code__", None) is frame.f_code:
            found = name
        frame = frame.f_back
    return found


def _without_derivative(operator: Any) -> Callable[..., Any]:
    """For an operator that nothing is differentiated through."""

    def run(keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return run


def _transformed(operator: Any, setup: Callable[..., None], derivative: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with its derivative at the level of one transform; the levels below follow by dispatch."""

    @functools.cache
    def function() -> Any:
        from torch.autograd.function import _SingleLevelFunction

        class Transformed(_SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                *arguments, keyset = inputs
                # Within a Function both modes are off, which the levels below would take over.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                    output = operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
                setup(ctx, tuple(arguments), output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                found = _as_tuple(derivative(ctx, *gradients))
                given = (*ctx.saved_tensors, *gradients)
                # `alias` makes leaves of what a transform has left, which are nobody's when the derivative is done.
                ended = not any(t is not None and t.view_as(t).requires_grad for t in given)
                # Tensors in lists have none.
                tensors = (each if isinstance(each, Tensor) else None for each in found)
                return *(each.detach() if each is not None and ended else each for each in tensors), None

        return Transformed

    def run(keyset: Any, *arguments: Any) -> Any:
        from torch._functorch import autograd_function

        with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            return function().apply(*arguments, keyset)

    return run


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _one_by_one(operator: Any) -> Callable[..., Any]:
    """The rule of `torch.func.vmap`: the operator for each entry of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def entry(argument: Any, dim: Any, index: int) -> Any:
            if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [entry(each, at, index) for each, at in zip(argument, dim, strict=True)]
            if dim is None:
                return argument
            # Without any entry the shapes are those of zeros.
            return argument.select(dim, index) if info.batch_size else argument.sum(dim).to(argument.dtype)

        found = [
            operator(*(entry(argument, dim, index) for argument, dim in zip(arguments, in_dims, strict=True)))
            for index in range(max(info.batch_size, 1))
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found)[: info.batch_size], 0
        outputs = tuple(torch.stack(each)[: info.batch_size] for each in zip(*found, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


# What `checks` asks of a subclass of tensors, which may refuse operators that it does not know.
define("probe", "(Tensor x) -> Tensor", lambda x: x.new_empty(()), lambda x: x.new_empty(()))
