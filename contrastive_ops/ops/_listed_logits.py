"""Logits of listed pairs whose rows have a gradient that is not rounded.

`similarity_topk_at` with rows in the accumulation dtype, whose numbers are of the columns' dtype: their gradient can
cancel with that of another operator before it is rounded to 16 bits. Columns may be too many to be copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.backends import choose
from ..core.operators import call, define
from ..core.problem import LogitSets, Problem
from ..core.rules import Pairs
from .similarity_topk import BACKENDS


def listed_logits(
    problem: Problem,
    indices: Tensor,
    scale: Tensor,
    log_weight: tuple[Tensor, Tensor, Tensor] | None,
    backend: str,
) -> Tensor:
    """(N, P) logits of the columns that each row lists, -inf for none; differentiable twice in x, y and scale.

    Args:
        problem: x (N, D) in the accumulation dtype, with numbers of the dtype of y; y (M, D).
        indices: (N, P) int64, -1 for none.
        scale: 0-d or (N,).
        log_weight: as in `Pairs`.
        backend: as in `similarity_topk`.
    """
    x, y = problem.x, problem.columns
    sets = LogitSets(Problem(problem.names, x.detach().to(y.dtype), y))
    sets.add(scale, None if log_weight is None else Pairs(log_weight=log_weight))
    chosen = choose(problem.names[0], BACKENDS, y, backend)
    return call.listed_logits(x, *sets.arguments()[1:3], *sets.layout().encode(), indices, chosen)


def _forward(x: Tensor, y: Tensor, scale: Tensor, *arguments: Any) -> Tensor:
    return call.similarity_topk_at(x.to(y.dtype), y, scale, None, None, *arguments)


def _fake(x: Tensor, y: Tensor, scale: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(arguments[2].shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, scale, pair_data, ctx.spec, indices, ctx.backend = inputs
    ctx.save_for_backward(x, y, scale, indices, *pair_data)


def _derivative(ctx: Any, d_values: Tensor) -> tuple[Any, ...]:
    x, y, scale, indices, *pair_data = ctx.saved_tensors
    needs = [bool(each) for each in ctx.needs_input_grad[:3]]
    bits = sum(1 << bit for bit, wanted in enumerate(needs) if wanted)
    dx, dy, dscale, *_ = call.similarity_topk_backward(
        x.to(y.dtype), y, scale, None, None, pair_data, ctx.spec, indices, d_values, bits, ctx.backend
    )
    gradients = (
        gradient if wanted else None for gradient, wanted in zip((dx, dy.to(y.dtype), dscale), needs, strict=True)
    )
    return (*gradients, [None] * len(pair_data), None, None, None)


define(
    "listed_logits",
    "(Tensor x, Tensor y, Tensor scale, Tensor[] pair_data, SymInt[] spec, Tensor indices, str backend)"
    " -> Tensor values",
    _forward,
    _fake,
    _setup,
    _derivative,
)
