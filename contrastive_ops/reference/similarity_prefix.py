"""similarity_prefix in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_prefix.py takes. `backward` is made
of differentiable operations, so that it also defines the second derivative of every backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows, merge_lse, probability, times
from ..core.ordered import long_product, wide_dtype
from ..core.recompute import recomputed
from ..core.unit_rows import SHORTEST


def segments(dims: Sequence[int]) -> list[slice]:
    """The columns that each prefix adds to the one before it."""
    return [slice(begin, end) for begin, end in itertools.pairwise((0, *dims))]


def inverse_lengths(x: Tensor, dims: Sequence[int], normalize: bool) -> tuple[Tensor, Tensor]:
    """Return (P, N) factors that make each prefix of each row one of length 1, and their squared slope.

    The slope is factor^2 = -d log(factor) / d(half the squared length): 0 where nothing is normalised, and for rows
    shorter than `SHORTEST`, whose factor is a constant.
    """
    if not normalize:
        return x.new_ones((len(dims), x.shape[0])), x.new_zeros((len(dims), x.shape[0]))
    squared = torch.stack([x[:, columns].square().sum(1) for columns in segments(dims)]).cumsum(0)
    long = squared > SHORTEST**2
    # The square root is kept away from 0, where its infinite slope would turn a masked gradient into NaN.
    inverse = torch.where(long, torch.where(long, squared, 1.0).sqrt().reciprocal(), 1 / SHORTEST)
    return inverse, torch.where(long, inverse.square(), 0.0)


class _Matrices:
    """Both sides in the accumulation dtype, the factors of their prefixes, and which pairs are in no fold."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        target: Tensor | None,
        differ_rows: Tensor | None,
        differ_cols: Tensor | None,
        dims: Sequence[int],
        diagonal: int | None,
        normalize: bool,
    ) -> None:
        dtype = accumulator(x.dtype)
        self.x = x.to(dtype)
        self.y = self.x if y is None else y.to(dtype)
        self.target, self.differ_rows, self.differ_cols, self.diagonal = target, differ_rows, differ_cols, diagonal
        self.segments = segments(dims)
        self.x_factor, self.x_slope = inverse_lengths(self.x, dims, normalize)
        self.y_factor, self.y_slope = (
            (self.x_factor, self.x_slope) if y is None else inverse_lengths(self.y, dims, normalize)
        )

    @property
    def columns(self) -> int:
        return self.y.shape[0]

    def factors(self, prefix: int, part: slice) -> Tensor:
        return self.x_factor[prefix, part, None] * self.y_factor[prefix]

    def left_out(self, part: slice) -> Tensor:
        """True for pairs that no fold of the rows or columns sees."""
        row = torch.arange(part.start, part.stop, device=self.x.device)[:, None]
        column = torch.arange(self.columns, device=self.x.device)
        out = torch.zeros((part.stop - part.start, self.columns), dtype=torch.bool, device=self.x.device)
        if self.target is not None:
            out = out | (self.target[part, None] == column)
        if self.diagonal is not None:
            out = out | (row + self.diagonal == column)
        if self.differ_rows is not None and self.differ_cols is not None:
            own = self.differ_rows[part, None]
            out = out | ((own == self.differ_cols) & (own != -1))
        return out


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    differ_rows: Tensor | None,
    differ_cols: Tensor | None,
    dims: Sequence[int],
    diagonal: int | None,
    normalize: bool,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows (P, N), cols (P, M), target_logit (P, N)); what was not asked for is empty."""
    m = _Matrices(x, y, target, differ_rows, differ_cols, dims, diagonal, normalize)
    rows, cols, target_logit = (
        m.x.new_full((len(dims), size if wanted else 0), -torch.inf)
        for size, wanted in ((len(m.x), directions & 1), (m.columns, directions & 2), (len(m.x), target is not None))
    )
    cols = cols.to(wide_dtype(x))  # chunks add to it
    for part in chunks_of_rows(len(m.x), max(1, CHUNK_ELEMENTS // max(m.columns, 1))):
        out = m.left_out(part)
        dots = torch.zeros(out.shape, dtype=m.x.dtype, device=x.device)
        for prefix, columns in enumerate(m.segments):
            dots = dots + m.x[part, columns] @ m.y[:, columns].T
            logits = scale * (dots * m.factors(prefix, part))
            if target is not None:
                target_logit[prefix, part] = logits.gather(1, target[part, None]).squeeze(1)
            logits = logits.masked_fill(out, -torch.inf)
            if directions & 1:
                rows[prefix, part] = logits.logsumexp(1)
            if directions & 2:
                cols[prefix] = merge_lse(cols[prefix], logits.logsumexp(0).to(cols.dtype))
    return rows, cols.to(m.x.dtype), target_logit


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    differ_rows: Tensor | None,
    differ_cols: Tensor | None,
    dims: Sequence[int],
    diagonal: int | None,
    normalize: bool,
    rows: Tensor,
    cols: Tensor,
    d_rows: Tensor | None,
    d_cols: Tensor | None,
    d_target: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, y and scale in the accumulation dtype."""
    m = _Matrices(x, y, target, differ_rows, differ_cols, dims, diagonal, normalize)

    def one_chunk(part: slice) -> tuple[Tensor, ...]:
        out = m.left_out(part)
        parts = [m.x[part, columns] @ m.y[:, columns].T for columns in m.segments]
        all_dots = list(itertools.accumulate(parts))
        weights = torch.zeros_like(parts[0])
        found: list[tuple[Tensor, ...]] = []
        for prefix, columns in reversed(list(enumerate(m.segments))):
            factors = m.factors(prefix, part)
            cosines = all_dots[prefix] * factors
            logits, e = scale * cosines, torch.zeros_like(cosines)
            if d_rows is not None:
                e = e + probability(logits, rows[prefix, part, None]) * d_rows[prefix, part, None]
            if d_cols is not None:
                e = e + probability(logits, cols[prefix]) * d_cols[prefix]
            e = e.masked_fill(out, 0.0)
            if d_target is not None and target is not None:
                e = e.scatter_add(1, target[part, None], d_target[prefix, part, None])
            along = times(e, cosines)
            # A prefix weighs all columns before its end, so a segment has the weights of the prefixes from its own on.
            weights = weights + e * (scale * factors)
            of_segment = long_product(weights, m.y[:, columns]), long_product(weights.T, m.x[part, columns])
            found.append((*of_segment, along.sum(1), along.sum(0)))
        dx_parts, dy_parts, by_row_parts, by_col_parts = zip(*reversed(found), strict=True)
        return torch.cat(dx_parts, 1), torch.cat(dy_parts, 1), torch.stack(by_row_parts), torch.stack(by_col_parts)

    run = recomputed(one_chunk)
    dx, dy = torch.zeros_like(m.x), torch.zeros_like(m.y)
    by_row, by_col = torch.zeros_like(m.x_factor), torch.zeros_like(m.y_factor)
    end = dims[-1]
    for part in chunks_of_rows(len(m.x), max(1, CHUNK_ELEMENTS // max(m.columns * len(dims), 1))):
        dx[part, :end], dy_part, by_row[:, part], by_col_part = run(part)
        dy[:, :end] += dy_part
        by_col += by_col_part
    if normalize:
        dx = dx - weighted_prefixes(m.x, m.segments, scale * by_row * m.x_slope)
        dy = dy - weighted_prefixes(m.y, m.segments, scale * by_col * m.y_slope)
    if y is None:
        dx, dy = dx + dy, dy[:0]
    return (
        dx if needs & 1 else dx[:0],
        dy if needs & 2 else dy[:0],
        by_row.sum() if needs & 4 else by_row.new_empty((0,)),
    )


def weighted_prefixes(x: Tensor, parts: list[slice], share: Tensor) -> Tensor:
    """The sum over prefixes of share (P, N) times the prefix of each row."""
    from_here_on = share.flip(0).cumsum(0).flip(0)
    total = torch.zeros_like(x)
    for prefix, columns in enumerate(parts):
        total[:, columns] = from_here_on[prefix, :, None] * x[:, columns]
    return total
