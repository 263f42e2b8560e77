"""torch.library operators of similarity_distill: schema, fake, autograd.

The teacher is a constant. `statistics` are what backward reads of each row and column; they are not differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.backends import Backend
from ..core.checks import accumulator
from ..core.derivatives import gradient_shapes, needed, second_derivative, to_inputs
from ..core.operators import call, define, of_backend
from ..reference import similarity_distill as reference

_SIDE = "Tensor {0}x, Tensor {0}y, Tensor {0}scale, Tensor? {0}row_bias, Tensor? {0}col_bias"
_PROBLEM = (
    f"{_SIDE.format('')}, {_SIDE.format('teacher_')}, Tensor[] pair_data, SymInt[] spec, str kind, float delta,"
    " int dims"
)
_FORWARD = f"({_PROBLEM}, SymInt kept_size, str backend) -> (Tensor values, Tensor statistics, Tensor kept)"
_BACKWARD = (
    f"({_PROBLEM}, Tensor statistics, Tensor d_values, Tensor kept, int needs, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dscale, Tensor drow_bias, Tensor dcol_bias)"
)
# Tensors of the problem that are not in `pair_data`, of which the first are differentiated; what follows pair_data.
_TENSORS, _DIFFERENTIABLE, _PROBLEM_SIZE = 10, 5, 15


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""
    for name, schema, fake, setup, derivative in (
        ("forward", _FORWARD, _forward_fake, _forward_setup, _forward_derivative),
        ("backward", _BACKWARD, _backward_fake, _backward_setup, _backward_derivative),
    ):
        define(f"similarity_distill_{name}", schema, of_backend(backends, name), fake, setup, derivative)


def _save(ctx: Any, inputs: tuple[Any, ...], *others: Any) -> None:
    pair_data = inputs[_TENSORS]
    ctx.save_for_backward(*inputs[:_TENSORS], *pair_data, *others)
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.pair_count = inputs[_TENSORS + 1 : _PROBLEM_SIZE], len(pair_data)


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """Return the problem, as the operators take it, and the other tensors that were kept."""
    tensors = list(ctx.saved_tensors)
    end = _TENSORS + ctx.pair_count
    return [*tensors[:_TENSORS], tensors[_TENSORS:end], *ctx.numbers], tensors[end:]


def _no_gradients(ctx: Any) -> tuple[Any, ...]:
    """For the teacher, pair_data and the numbers that follow it in the problem."""
    return (*(None,) * (_TENSORS - _DIFFERENTIABLE), [None] * ctx.pair_count, *(None,) * (_PROBLEM_SIZE - _TENSORS - 1))


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, y = arguments[:2]
    _, _, kind, _, dims, kept_size, _ = arguments[_TENSORS:]
    lines = x.shape[0] * bool(dims & reference.ROWS) + y.shape[0] * bool(dims & reference.COLS)
    dtype = accumulator(x.dtype)
    return (
        x.new_empty((lines,), dtype=dtype),
        x.new_empty((5, 0 if kind in reference.PAIRWISE else lines), dtype=dtype),
        x.new_empty((kept_size,), dtype=dtype),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.backend = inputs[-1]


def _forward_derivative(ctx: Any, d_values: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_values is None:
        return (*(None,) * _DIFFERENTIABLE, *_no_gradients(ctx), None, None)
    problem, (statistics, kept) = _saved(ctx)
    needs = needed(ctx)
    gradients = call.similarity_distill_backward(*problem, statistics, d_values, kept, needs, ctx.backend)
    return (*to_inputs(problem, gradients, needs), *_no_gradients(ctx), None, None)


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward_fake(x: Tensor, y: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in gradient_shapes(x, y, scale, needs))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, d_values, *_ = inputs[_PROBLEM_SIZE:]
    _save(ctx, inputs, d_values)
    ctx.needs = inputs[-2]


def _backward_derivative(ctx: Any, *d_gradients: Tensor | None) -> tuple[Any, ...]:
    """The second derivative: autograd through the streamed reference, whatever the backend was."""
    problem, (d_values,) = _saved(ctx)
    rest = problem[_DIFFERENTIABLE:]

    def function(*inputs: Any) -> Tensor:
        return reference.values(*inputs, *rest)[0]

    *gradients, by_values = second_derivative(function, problem[:_DIFFERENTIABLE], d_values, d_gradients, ctx.needs)
    return (*gradients, *_no_gradients(ctx), None, by_values, None, None, None)
