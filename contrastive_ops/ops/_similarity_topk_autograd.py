"""torch.library operators of similarity_topk: schema, fake, autograd.

`forward` selects, `at` computes the logits of listed pairs. Both have the same derivative, `backward`: that of the
logits that `indices` names. The selection itself is not differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.backends import Backend
from ..core.checks import accumulator
from ..core.derivatives import alias, grad, gradient_shapes, needed, to_inputs
from ..core.operators import call, define, of_backend
from ..core.problem import STATISTICS
from ..reference import similarity_topk as reference

_PROBLEM = "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor[] pair_data, SymInt[] spec"
_FORWARD = (
    f"({_PROBLEM}, SymInt k, Tensor? floor, Tensor? count_above, str backend)"
    " -> (Tensor values, Tensor indices, Tensor counts, Tensor statistics)"
)
_AT = f"({_PROBLEM}, Tensor indices, str backend) -> Tensor values"
_BACKWARD = (
    f"({_PROBLEM}, Tensor indices, Tensor d_values, int needs, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dscale, Tensor drow_bias, Tensor dcol_bias)"
)

_PAIR_DATA, _SPEC = 5, 6


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""
    for name, schema, fake, setup, derivative in (
        ("forward", _FORWARD, _forward_fake, _forward_setup, _forward_derivative),
        ("at", _AT, _at_fake, _at_setup, _at_derivative),
        ("backward", _BACKWARD, _backward_fake, _backward_setup, _backward_derivative),
    ):
        define(f"similarity_topk_{name}", schema, of_backend(backends, name), fake, setup, derivative)


def _save(ctx: Any, inputs: tuple[Any, ...], *others: Any) -> None:
    pair_data = inputs[_PAIR_DATA]
    ctx.save_for_backward(*inputs[:_PAIR_DATA], *pair_data, *others)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.pair_count, ctx.backend = inputs[_SPEC], len(pair_data), inputs[-1]


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """Return the problem, as the operators take it, and the other tensors that were kept."""
    tensors = list(ctx.saved_tensors)
    end = _PAIR_DATA + ctx.pair_count
    return [*tensors[:_PAIR_DATA], tensors[_PAIR_DATA:end], ctx.spec], tensors[end:]


def _derivative(ctx: Any, d_values: Tensor | None, others: int) -> tuple[Any, ...]:
    problem, (indices,) = _saved(ctx)
    rest = ([None] * ctx.pair_count, *(None,) * others)
    if d_values is None:
        return (*(None,) * _PAIR_DATA, *rest)
    needs = needed(ctx)
    gradients = call.similarity_topk_backward(*problem, indices, d_values, needs, ctx.backend)
    return (*to_inputs(problem, gradients, needs), *rest)


# ---- forward ---------------------------------------------------------------------------------------------------


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, k, count_above = arguments[0], arguments[_SPEC + 1], arguments[-2]
    rows = x.shape[0]
    return (
        x.new_empty((rows, k), dtype=accumulator(x.dtype)),
        x.new_empty((rows, k), dtype=torch.int64),
        x.new_empty((rows,), dtype=torch.int64),
        x.new_empty((0 if count_above is None else len(STATISTICS), rows), dtype=torch.int64),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, indices, counts, statistics = output
    _save(ctx, inputs, indices)
    ctx.mark_non_differentiable(indices, counts, statistics)


def _forward_derivative(ctx: Any, d_values: Any, *_: Any) -> tuple[Any, ...]:
    return _derivative(ctx, d_values, 5)


# ---- at --------------------------------------------------------------------------------------------------------


def _at_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(arguments[-2].shape, dtype=accumulator(x.dtype))


def _at_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, inputs[-2])


def _at_derivative(ctx: Any, d_values: Any) -> tuple[Any, ...]:
    return _derivative(ctx, d_values, 3)


# ---- backward --------------------------------------------------------------------------------------------------


def _backward_fake(x: Tensor, y: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in gradient_shapes(x, y, scale, needs))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    indices, d_values, needs, _ = inputs[_SPEC + 1 :]
    _save(ctx, inputs, indices, d_values)
    ctx.needs = needs


def _backward_derivative(ctx: Any, *d_gradients: Any) -> tuple[Any, ...]:
    """The second derivative: autograd through the streamed reference, whatever the backend was."""
    problem, (indices, d_values) = _saved(ctx)
    with torch.enable_grad(), autocast.disabled(problem[0]):
        tensors = [alias(t) for t in (*problem[:_PAIR_DATA], d_values)]
        leaves = [a for a in tensors if a is not None and a.requires_grad]
        arguments: list[Any] = [*tensors[:-1], *problem[_PAIR_DATA:], indices, tensors[-1], ctx.needs]
        outputs = reference.backward(*arguments)
        pairs = [(o, d) for o, d in zip(outputs, d_gradients, strict=True) if d is not None and o.requires_grad]
        found = iter(grad([o for o, _ in pairs], leaves, [d for _, d in pairs]))
    gradients = [next(found) if a is not None and a.requires_grad else None for a in tensors]
    return (*gradients[:-1], [None] * ctx.pair_count, None, None, gradients[-1], None, None)
