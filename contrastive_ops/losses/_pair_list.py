"""Inner products of a list of pairs, a bounded chunk of gathered rows at a time.

Two bilinear operators, each the other's derivative, so that they can be differentiated any number of times. A traced
program does not see the chunks, whose number would bind it to one length of the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows
from ..core.operators import call, define
from ..core.ordered import add_segments


def pair_similarity(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(P,) inner products <x[rows[k]], y[cols[k]]> in the accumulation dtype; differentiable in x and y."""
    return call.pair_similarity(x, y, rows, cols)


def scatter_pairs(grad: Tensor, y: Tensor, rows: Tensor, cols: Tensor, size: int) -> Tensor:
    """(size, D): row r is the sum of grad[k] * y[cols[k]] over the pairs k with rows[k] = r."""
    return call.scatter_pairs(grad, y, rows, cols, size)


def _chunks(pairs: Tensor, x: Tensor) -> Iterator[slice]:
    return chunks_of_rows(pairs.shape[0], max(1, CHUNK_ELEMENTS // max(x.shape[1], 1)))


def _similarity(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    dtype = checks.accumulator(x.dtype)
    out = x.new_empty(rows.shape, dtype=dtype)
    with autocast.disabled(x):
        for part in _chunks(rows, x):
            out[part] = (x[rows[part]].to(dtype) * y[cols[part]].to(dtype)).sum(1)
    return out


def _similarity_fake(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return x.new_empty(rows.shape, dtype=checks.accumulator(x.dtype))


def _similarity_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, rows, cols = ctx.saved_tensors
    dx = scatter_pairs(grad, y, rows, cols, x.shape[0]).to(x.dtype) if ctx.needs_input_grad[0] else None
    dy = scatter_pairs(grad, x, cols, rows, y.shape[0]).to(y.dtype) if ctx.needs_input_grad[1] else None
    return dx, dy, None, None


def _scatter(grad: Tensor, y: Tensor, rows: Tensor, cols: Tensor, size: int) -> Tensor:
    dtype = checks.accumulator(y.dtype)
    out = y.new_zeros((size, y.shape[1]), dtype=dtype)
    with autocast.disabled(y):
        for part in _chunks(rows, y):
            add_segments(out, grad[part, None].to(dtype) * y[cols[part]].to(dtype), rows[part])
    return out


def _scatter_fake(grad: Tensor, y: Tensor, rows: Tensor, cols: Tensor, size: int) -> Tensor:
    return y.new_empty((size, y.shape[1]), dtype=checks.accumulator(y.dtype))


def _scatter_derivative(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    grad, y, rows, cols = ctx.saved_tensors
    d_grad = pair_similarity(d_out, y, rows, cols) if ctx.needs_input_grad[0] else None
    dy = scatter_pairs(grad, d_out, cols, rows, y.shape[0]).to(y.dtype) if ctx.needs_input_grad[1] else None
    return d_grad, dy, None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


for _name, _schema, _function, _fake, _derivative in (
    (
        "pair_similarity",
        "(Tensor x, Tensor y, Tensor rows, Tensor cols) -> Tensor",
        _similarity,
        _similarity_fake,
        _similarity_derivative,
    ),
    (
        "scatter_pairs",
        "(Tensor grad, Tensor y, Tensor rows, Tensor cols, SymInt size) -> Tensor",
        _scatter,
        _scatter_fake,
        _scatter_derivative,
    ),
):
    define(_name, _schema, _function, _fake, _save, _derivative)
