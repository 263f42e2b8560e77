"""torch.library operators of similarity_values: schema, fake, autograd. `lse` is not differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.backends import Backend
from ..core.checks import accumulator
from ..core.derivatives import gradient_shapes, needed, second_derivative, to_inputs
from ..core.operators import call, define, of_backend
from ..reference import similarity_values as reference

_PROBLEM = (
    "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor values, Tensor[] pair_data,"
    " SymInt[] spec"
)
_FORWARD = f"({_PROBLEM}, SymInt kept_size, str backend) -> (Tensor sums, Tensor lse, Tensor kept)"
_BACKWARD = (
    f"({_PROBLEM}, Tensor sums, Tensor lse, Tensor d_sums, Tensor kept, int needs, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dscale, Tensor drow_bias, Tensor dcol_bias, Tensor dvalues)"
)
# x, y, scale, row_bias, col_bias and values are differentiated; bit b of `needs` stands for input b.
_TENSORS, _PROBLEM_SIZE = 6, 8


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""
    for name, schema, fake, setup, derivative in (
        ("forward", _FORWARD, _forward_fake, _forward_setup, _forward_derivative),
        ("backward", _BACKWARD, _backward_fake, _backward_setup, _backward_derivative),
    ):
        define(f"similarity_values_{name}", schema, of_backend(backends, name), fake, setup, derivative)


def _save(ctx: Any, inputs: tuple[Any, ...], *others: Any) -> None:
    pair_data, ctx.spec = inputs[_TENSORS : _TENSORS + 2]
    ctx.save_for_backward(*inputs[:_TENSORS], *pair_data, *others)
    ctx.set_materialize_grads(False)
    ctx.pair_count = len(pair_data)


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """Return the problem, as the operators take it, and the other tensors that were kept."""
    tensors = list(ctx.saved_tensors)
    end = _TENSORS + ctx.pair_count
    return [*tensors[:_TENSORS], tensors[_TENSORS:end], ctx.spec], tensors[end:]


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    values, kept_size, dtype = arguments[_TENSORS - 2], arguments[-2], accumulator(x.dtype)
    shapes = (x.shape[0], values.shape[1]), (x.shape[0],), (kept_size,)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.backend = inputs[-1]


def _forward_derivative(ctx: Any, d_sums: Tensor | None, *_: Any) -> tuple[Any, ...]:
    of_the_rest = [None] * ctx.pair_count, None, None, None
    if d_sums is None:
        return (*(None,) * _TENSORS, *of_the_rest)
    problem, (sums, lse, kept) = _saved(ctx)
    needs = needed(ctx, _TENSORS)
    found = call.similarity_values_backward(*problem, sums, lse, d_sums, kept, needs, ctx.backend)
    return (*to_inputs(problem, found, needs), *of_the_rest)


def _backward_fake(x: Tensor, y: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    values, needs = arguments[2], arguments[-2]
    shapes = gradient_shapes(x, y, scale, needs)
    shapes.append((values.shape[0] if needs >> 5 & 1 else 0, values.shape[1]))
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in shapes)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, d_sums, *_ = inputs[_PROBLEM_SIZE:]
    _save(ctx, inputs, d_sums)
    ctx.needs = inputs[-2]


def _backward_derivative(ctx: Any, *d_gradients: Tensor | None) -> tuple[Any, ...]:
    """The second derivative: autograd through the streamed reference, whatever the backend was.

    Neither the sums nor their logsumexp count as inputs: they are functions of the others.
    """
    problem, (d_sums,) = _saved(ctx)
    rest = problem[_TENSORS:]

    def function(*inputs: Any) -> Tensor:
        return reference.weighted_sums(*inputs, *rest)[0]

    *gradients, by_d_sums = second_derivative(function, problem[:_TENSORS], d_sums, d_gradients, ctx.needs)
    return (*gradients, [None] * ctx.pair_count, None, None, None, by_d_sums, None, None, None)
