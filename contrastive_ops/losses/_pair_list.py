"""Inner products of a list of pairs, a bounded chunk of gathered rows at a time.

Both functions are bilinear and each is the other's derivative, so that they can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _autocast, _checks
from ..reference.similarity_reduce import CHUNK_ELEMENTS, chunks_of_rows


def pair_similarity(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(P,) inner products <x[rows[k]], y[cols[k]]> in the accumulation dtype; differentiable in x and y."""
    # torch.compile refuses one tensor in two places.
    y, cols = y.view_as(y) if y is x else y, cols.view_as(cols) if cols is rows else cols
    return _PairSimilarity.apply(x, y, rows, cols)


class _PairSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, rows, cols)
        dtype = _checks.accumulator(x.dtype)
        out = x.new_empty(rows.shape, dtype=dtype)
        with _autocast.disabled(x):
            for part in _chunks(rows, x):
                out[part] = (x[rows[part]].to(dtype) * y[cols[part]].to(dtype)).sum(1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, rows, cols = ctx.saved_tensors
        dx = _ScatterPairs.apply(grad, y, rows, cols, len(x)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dy = _ScatterPairs.apply(grad, x, cols, rows, len(y)).to(y.dtype) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None


class _ScatterPairs(torch.autograd.Function):
    """(size, D): row r is the sum of grad[k] * y[cols[k]] over the pairs k with rows[k] = r."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, y: Tensor, rows: Tensor, cols: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(grad, y, rows, cols)
        dtype = _checks.accumulator(y.dtype)
        out = y.new_zeros((size, y.shape[1]), dtype=dtype)
        with _autocast.disabled(y):
            for part in _chunks(rows, y):
                out.index_add_(0, rows[part], grad[part, None].to(dtype) * y[cols[part]].to(dtype))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        grad, y, rows, cols = ctx.saved_tensors
        d_grad = _PairSimilarity.apply(d_out, y, rows, cols) if ctx.needs_input_grad[0] else None
        dy = _ScatterPairs.apply(grad, d_out, cols, rows, len(y)).to(y.dtype) if ctx.needs_input_grad[1] else None
        return d_grad, dy, None, None, None


def _chunks(pairs: Tensor, x: Tensor) -> Iterator[slice]:
    return chunks_of_rows(pairs.shape[0], max(1, CHUNK_ELEMENTS // max(x.shape[1], 1)))
