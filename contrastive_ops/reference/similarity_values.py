"""similarity_values in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_values.py takes. `weighted_sums` is
made of differentiable operations: it defines the second derivative of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.numerics import CHUNK_ELEMENTS, balanced, chunks_of_rows, times
from ..core.ordered import long_product
from ..core.problem import Layout, ScaleOf
from ..core.recompute import recomputed
from .pairs import SetOfChunk, chunk_sets, inner_products


class _Problem:
    """The arguments that all operators share, and chunks of the logits."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        values: Tensor,
        pair_data: Sequence[Tensor],
        spec: Sequence[int],
    ) -> None:
        self.x, self.y, self.scale, self.row_bias, self.col_bias = x, y, scale, row_bias, col_bias
        self.dtype = accumulator(x.dtype)
        self.values = values.to(self.dtype)
        self.layout = Layout.decode(pair_data, spec)

    def chunks(self) -> Iterator[slice]:
        return chunks_of_rows(self.x.shape[0], max(1, CHUNK_ELEMENTS // max(self.y.shape[0], 1)))

    def logits(self, rows: slice) -> tuple[SetOfChunk, Tensor]:
        """The set of a chunk, and its logits: -inf where a pair takes no part."""
        dots = inner_products(self.x[rows], self.y)
        own = self.x, self.y, self.scale, self.row_bias, self.col_bias, None
        (each,) = chunk_sets(self.layout, rows, dots, *own)
        return each, each.without_left_out()


def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """Softmax of the rows from their logsumexp; 0 in rows in which no pair takes part."""
    return (logits - torch.where(lse == -torch.inf, torch.inf, lse)[:, None]).exp()


def weighted_sums(*problem: Any) -> tuple[Tensor, Tensor]:
    """Return (sums, lse)."""
    p = _Problem(*problem)

    def one_chunk(rows: slice) -> tuple[Tensor, Tensor]:
        _, logits = p.logits(rows)
        if logits.shape[1] == 0:
            return logits @ p.values, logits.sum(1) - torch.inf
        # Rows without a pair: a softmax of -inf alone is NaN, and its gradient too.
        lse = logits.detach().logsumexp(1)
        empty = (lse == -torch.inf)[:, None]
        safe = logits.masked_fill(empty, 0.0).softmax(1)
        return long_product(safe.masked_fill(empty, 0.0), p.values), lse

    run = recomputed(one_chunk)
    sums = p.values.new_zeros((p.x.shape[0], p.values.shape[1]))
    lse = p.values.new_full(p.x.shape[:1], -torch.inf)
    for rows in p.chunks():
        sums[rows], lse[rows] = run(rows)
    return sums, lse


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sums, lse, kept): the problem and `kept_size`, see the operator."""
    *problem, kept_size = arguments
    x = problem[0]
    return *weighted_sums(*problem), x.new_empty((kept_size,), dtype=accumulator(x.dtype))


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of x, y, scale, row_bias, col_bias and values in the accumulation dtype."""
    *problem, sums, lse, d_sums, _, needs = arguments
    p = _Problem(*problem)
    dx, dy = (t.new_zeros(t.shape, dtype=p.dtype) for t in (p.x, p.y))
    dscale, dvalues = torch.zeros_like(p.scale), torch.zeros_like(p.values)
    drow_bias, dcol_bias = (t.new_zeros(t.shape[:1], dtype=p.dtype) for t in (p.x, p.y))
    of_rows_scale = p.layout.sets[0].scale_of == ScaleOf.ROWS
    for rows in p.chunks():
        own, logits = p.logits(rows)
        weight, upstream = _probabilities(logits, lse[rows]), d_sums[rows]
        dvalues += long_product(weight.T, upstream)
        mean = (upstream * sums[rows]).sum(1, keepdim=True)
        e = balanced(torch.where(weight == 0, 0.0, weight * (upstream @ p.values.T - mean)), weight)
        by_dots = e * own.scale
        dx[rows] = long_product(by_dots, p.y.to(p.dtype))
        dy += long_product(by_dots.T, p.x[rows].to(p.dtype))
        drow_bias[rows] = own.sign * e.sum(1)
        dcol_bias += own.sign * e.sum(0)
        dscale[rows if of_rows_scale else slice(0, 1)] += own.scale_gradient(times(e, own.dots))
    full = (dx, dy, dscale, drow_bias, dcol_bias, dvalues)
    return tuple(g if needs >> bit & 1 else g[:0] for bit, g in enumerate(full))
