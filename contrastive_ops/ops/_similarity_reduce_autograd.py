"""torch.library operators of similarity_reduce: schema, fake, autograd.

They exist without the compiled extension, so that tracing, export and meta tensors never depend on it. What needs a
gradient is an argument: inside an operator grad mode says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, unit_lengths
from ..core.backends import Backend
from ..core.checks import accumulator, check_index_values
from ..core.derivatives import alias, grad, gradient_shapes, needed, to_inputs
from ..core.operators import call, define
from ..core.problem import Layout
from ..reference import similarity_reduce as reference
from ._idle_rows import without_idle_rows

_PROBLEM = (
    "Tensor x, Tensor? y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor{q} target,"
    " Tensor[] pair_data, SymInt[] spec"
)
_FORWARD = (
    f"({_PROBLEM.format(q='?')}, SymInt kept_size, str backend)"
    " -> (Tensor folds, Tensor argmax, Tensor target_logit, Tensor linear, Tensor kept)"
)
_BACKWARD = (
    f"({_PROBLEM.format(q='?')}, Tensor folds, Tensor argmax, Tensor? d_folds, Tensor? d_target, Tensor? d_linear,"
    " Tensor kept, int needs, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dscale, Tensor drow_bias, Tensor dcol_bias)"
)

# Inputs that can need a gradient; bit b of `needs` stands for input b. `pair_data` and `spec` follow the target.
_X, _Y, _SCALE, _ROW_BIAS, _COL_BIAS, _TARGET, _PAIR_DATA, _SPEC = range(8)


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""

    def run(backend: str, name: str, problem: list[Any], gradients: int | None) -> Any:
        with autocast.disabled(problem[0]):
            function = getattr(backends[backend].functions(), name)
            if gradients is not None:
                problem = without_idle_rows(problem, _X, _TARGET, _PAIR_DATA)
            return unit_lengths.run(function, problem, backend == "reference", gradients)

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, backend = arguments
        _check_target(problem, backend)
        return run(backend, "forward", problem, None)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, backend = arguments
        return run(backend, "backward", problem, 0)

    for name, schema, function, fake, setup, derivative in (
        ("forward", _FORWARD, forward, _forward_fake, _forward_setup, _forward_derivative),
        ("backward", _BACKWARD, backward, _backward_fake, _backward_setup, _backward_derivative),
    ):
        define(f"similarity_reduce_{name}", schema, function, fake, setup, derivative)


def _check_target(problem: list[Any], backend: str) -> None:
    x, y, target = problem[_X], problem[_Y], problem[_TARGET]
    if target is not None:  # CUDA kernels give NaN for one that does not exist
        check_index_values(
            "similarity_reduce", "target", target, (x if y is None else y).shape[0], waits=backend != "cuda"
        )


def _save(ctx: Any, inputs: tuple[Any, ...], *others: Any) -> None:
    """Keep the problem and other tensors for `_saved`."""
    pair_data = inputs[_PAIR_DATA]
    ctx.save_for_backward(*inputs[:_PAIR_DATA], *pair_data, *others)
    ctx.set_materialize_grads(False)  # a gradient of zeros for `kept` would be as large as the matrix
    ctx.spec, ctx.pair_count = inputs[_SPEC], len(pair_data)


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """Return the problem, as the operators take it, and the other tensors that were kept."""
    tensors = list(ctx.saved_tensors)
    end = _PAIR_DATA + ctx.pair_count
    return [*tensors[:_PAIR_DATA], tensors[_PAIR_DATA:end], ctx.spec], tensors[end:]


def _no_gradients(ctx: Any, others: int) -> tuple[Any, ...]:
    """For the target, pair_data, spec and whatever else follows them."""
    return (None, [None] * ctx.pair_count, None, *(None,) * others)


# ---- forward ---------------------------------------------------------------------------------------------------


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, *_, target, pair_data, spec, kept_size, _ = arguments
    rows, columns = x.shape[0], x.shape[0] if y is None else y.shape[0]
    layout, dtype = Layout.decode(pair_data, spec), accumulator(x.dtype)
    return (
        x.new_empty((sum(layout.sizes(rows, columns)),), dtype=dtype),
        x.new_empty((sum(layout.argmax_sizes(rows, columns)),), dtype=torch.int64),
        x.new_empty((0 if target is None else rows,), dtype=dtype),
        x.new_empty((rows if layout.has_linear else 0,), dtype=dtype),
        x.new_empty((kept_size,), dtype=dtype),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    folds, argmax, _, linear, kept = output
    _save(ctx, inputs, folds, argmax, kept)
    ctx.mark_non_differentiable(argmax, kept)
    ctx.backend, ctx.has_linear = inputs[-1], linear.shape[0] != 0


def _forward_derivative(ctx: Any, d_folds: Any, _: Any, d_target: Any, d_linear: Any, __: Any) -> tuple[Any, ...]:
    problem, (folds, argmax, kept) = _saved(ctx)
    # An output that was not asked for is empty, and so is whatever gradient arrives for it.
    d_target = None if problem[_TARGET] is None else d_target
    d_linear = d_linear if ctx.has_linear else None
    if d_folds is None and d_target is None and d_linear is None:
        return (None,) * 5 + _no_gradients(ctx, 2)
    needs = needed(ctx)
    gradients = call.similarity_reduce_backward(
        *problem, folds, argmax, d_folds, d_target, d_linear, kept, needs, ctx.backend
    )
    return to_inputs(problem, gradients, needs) + _no_gradients(ctx, 2)


# ---- backward --------------------------------------------------------------------------------------------------


def _backward_fake(x: Tensor, y: Any, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in gradient_shapes(x, y, scale, needs))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *others, needs, _ = inputs[_SPEC + 1 :]
    _save(ctx, inputs, *others)
    ctx.needs = needs


def _backward_derivative(ctx: Any, *d_gradients: Any) -> tuple[Any, ...]:
    """The second derivative: autograd through the streamed reference, whatever the backend was."""
    problem, others = _saved(ctx)
    with torch.enable_grad(), autocast.disabled(problem[0]):
        # Aliases: only what this operator itself does with an input counts, not how the folds came from x.
        tensors = [alias(t) for t in (*problem[:_TARGET], *others)]
        leaves = [a for a in tensors if a is not None and a.requires_grad]
        arguments: list[Any] = [*tensors[:_TARGET], *problem[_TARGET:], *tensors[_TARGET:], ctx.needs]
        arguments = without_idle_rows(arguments, _X, _TARGET, _PAIR_DATA)
        outputs = unit_lengths.run(reference.backward, arguments, True, 0)
        pairs = [(o, d) for o, d in zip(outputs, d_gradients, strict=True) if d is not None and o.requires_grad]
        found = iter(grad([o for o, _ in pairs], leaves, [d for _, d in pairs]))
    gradients = [next(found) if a is not None and a.requires_grad else None for a in tensors]
    return (*gradients[:_TARGET], *_no_gradients(ctx, 0), *gradients[_TARGET:], None, None)
