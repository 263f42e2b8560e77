"""Squared distances of listed pairs, as sums of squared differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.derivatives import needed, second_derivative
from ..core.numerics import chunks_of_rows
from ..core.operators import call, define
from ..core.ordered import add_segments

# Numbers of gathered rows at a time: they stay in a cache.
CHUNK_ELEMENTS = 1 << 18


def listed_distances(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    """(N, P) minus the squared distance of each row of (N, D) from the rows (M, D) that it lists; 0 for -1.

    Differentiable twice in x and y, with O(N P) memory.
    """
    return call.listed_distances(x, y, indices)


def _steps(x: Tensor, indices: Tensor) -> Any:
    step = max(1, CHUNK_ELEMENTS // max(indices.shape[1] * x.shape[1], 1))
    return chunks_of_rows(x.shape[0], step)


def _differences(x: Tensor, y: Tensor, indices: Tensor, part: slice) -> Tensor:
    """(rows, P, D); 0 where a row lists -1."""
    column = indices[part]
    apart = x[part, None] - y.index_select(0, column.clamp_min(0).flatten()).view(*column.shape, -1)
    return apart.masked_fill((column < 0)[..., None], 0.0)


def distances(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    if y.shape[0] == 0 or x.shape[0] == 0:
        return x.new_zeros(indices.shape)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):  # for second derivatives
        return torch.cat([0.0 - _differences(x, y, indices, part).square().sum(2) for part in _steps(x, indices)])
    values = x.new_empty(indices.shape)
    for part in _steps(x, indices):
        column = indices[part].clamp_min(0)
        apart = y.index_select(0, column.flatten()).view(*column.shape, -1).sub_(x[part, None])
        values[part] = 0.0 - apart.square_().sum(2)
    return values.masked_fill_(indices < 0, 0.0)


def _distances_backward(x: Tensor, y: Tensor, indices: Tensor, d_values: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    dx, dy = (torch.zeros_like(t) if needs >> bit & 1 else t[:0].clone() for bit, t in enumerate((x, y)))
    for part in _steps(x, indices) if y.shape[0] > 0 and indices.numel() > 0 else ():
        along = -2 * d_values[part, :, None] * _differences(x, y, indices, part)
        along = along.masked_fill((indices[part] < 0)[..., None], 0.0)
        if needs & 1:
            dx[part] = along.sum(1)
        if needs & 2:
            add_segments(dy, -along.flatten(0, 1), indices[part].flatten().clamp_min(0))
    return dx, dy


def _backward_fake(x: Tensor, y: Tensor, indices: Tensor, d_values: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    dx, dy = (torch.empty_like(t) if needs >> bit & 1 else t.new_empty((0, t.shape[1])) for bit, t in enumerate((x, y)))
    return dx, dy


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.needs = inputs[4] if len(inputs) > 4 else 3


def _derivative(ctx: Any, d_values: Tensor) -> tuple[Any, ...]:
    x, y, indices = ctx.saved_tensors
    needs = needed(ctx, 2)
    dx, dy = call.listed_distances_backward(x, y, indices, d_values, needs)
    return dx if needs & 1 else None, dy if needs & 2 else None, None


def _second_derivative(ctx: Any, *d_gradients: Tensor) -> tuple[Any, ...]:
    x, y, indices, d_values = ctx.saved_tensors

    def function(x: Tensor, y: Tensor) -> Tensor:
        return distances(x, y, indices)

    by_x, by_y, by_values = second_derivative(function, [x, y], d_values, d_gradients, ctx.needs)
    return by_x, by_y, None, by_values, None


define(
    "listed_distances",
    "(Tensor x, Tensor y, Tensor indices) -> Tensor",
    distances,
    lambda x, y, indices: x.new_empty(indices.shape),
    _setup,
    _derivative,
)
define(
    "listed_distances_backward",
    "(Tensor x, Tensor y, Tensor indices, Tensor d_values, int needs) -> (Tensor dx, Tensor dy)",
    _distances_backward,
    _backward_fake,
    _setup,
    _second_derivative,
)
