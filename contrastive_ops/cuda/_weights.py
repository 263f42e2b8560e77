"""From inner products to gradients: weights of a chunk, the products with them, and sums of derivatives."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.cuda_kernels import kernels
from ..core.ordered import in_parts
from ..core.problem import ScaleOf, with_factors
from ..core.weight_norm import weight_norm
from . import _products
from ._chunks import Chunk, Problem
from ._pairs import dense

# Sums along rows and along columns that a kernel carries; csrc/cuda/similarity_sums.h has the same numbers.
ROW_SLOTS, COL_SLOTS = 3, 2


class SumOf(enum.IntEnum):
    """What is summed: rounding errors of the weights, dtotal/dl, dtotal/dl * inner product."""

    RESIDUAL = 0
    BIAS = 1
    SCALE = 2


class Sum(NamedTuple):
    """A sum for every row, or for every column.

    Attributes:
        what: of what.
        cols: one per column.
        set: the logit set, -1 for all of them.
    """

    what: SumOf
    cols: bool
    set: int = -1


class Wanted(NamedTuple):
    """What backward is to form.

    Attributes:
        dx: the gradient of x (of both sides where a matrix is compared with itself).
        dy: the gradient of y.
        sums: residuals first.
    """

    dx: bool
    dy: bool
    sums: tuple[Sum, ...]

    @classmethod
    def of(cls, p: Problem, target: Tensor | None, needs: int) -> Wanted:
        """What answers `needs`, which has a bit for each of x, y, scale, row_bias, col_bias."""
        needed = [bool(needs >> bit & 1) for bit in range(5)]
        dx, dy = needed[0], needed[1] and not p.itself
        sums = []
        if target is not None and p.x.element_size() == 2:  # what rounding weights loses is given back along the target
            sums += [Sum(SumOf.RESIDUAL, cols) for cols, wants in ((False, dx), (True, dy)) if wants]
        if needed[2]:
            sums += [_scale_sum(p, index) for index in range(len(p.layout.sets))]
        sums += [Sum(SumOf.BIAS, cols) for cols in (False, True) if needed[3 + cols]]
        return cls(dx, dy, tuple(sums))


def _scale_sum(p: Problem, index: int) -> Sum:
    return Sum(SumOf.SCALE, p.layout.sets[index].scale_of == ScaleOf.COLUMNS, index)


class Upstream(NamedTuple):
    """Folds, and what arrives at them.

    Attributes:
        values: of all folds.
        argmax: of those that are maxima.
        d_values: dtotal/dfold.
        d_target: at the targets' logits.
        d_linear: at the sums of lists.
        norm: what float16 weights are multiplied with.
    """

    values: Tensor
    argmax: Tensor
    d_values: Tensor | None
    d_target: Tensor | None
    d_linear: Tensor | None
    norm: Tensor | None

    @classmethod
    def of(
        cls,
        p: Problem,
        scale: Tensor,
        values: Tensor,
        argmax: Tensor,
        d_values: Tensor | None,
        d_target: Tensor | None,
        d_linear: Tensor | None,
    ) -> Upstream:
        """What backward is given."""
        arriving = dense(d_values), dense(d_target), dense(d_linear)
        norm = None
        if p.x.dtype == torch.float16:
            norm = weight_norm(p.layout, p.layout.sizes(*p.shape[:2]), p.itself, scale, *arriving)
        return cls(values.detach().contiguous(), argmax.contiguous(), *arriving, norm)


class Gradients(NamedTuple):
    """Gradients while they are formed, in float32 and, in float16, times the norm.

    Attributes:
        wanted: what is formed.
        upstream: what arrives.
        dx: that of x, or None.
        dy: that of y, or None.
        totals: all sums, one after another, in float64.
    """

    wanted: Wanted
    upstream: Upstream
    dx: Tensor | None
    dy: Tensor | None
    totals: Tensor

    @classmethod
    def of(cls, p: Problem, wanted: Wanted, upstream: Upstream) -> Gradients:
        """Gradients of nothing."""
        N, M, D = p.shape
        zeros = upstream.values.new_zeros
        # Chunks on the edges write what later ones add to; without any there is no pair.
        make = zeros if p.itself or N == 0 or M == 0 else upstream.values.new_empty
        dx, dy = make((N, D)) if wanted.dx else None, make((M, D)) if wanted.dy else None
        totals = zeros((sum(p.shape[each.cols] for each in wanted.sums),), dtype=torch.float64)
        return cls(wanted, upstream, dx, dy, totals)

    def add(self, p: Problem, chunk: Chunk, weights: Tensor, spread: Tensor | None = None) -> None:
        """Add what the pairs of a chunk give; `weights` and `spread` are memory for as many numbers."""
        numbers, up = chunk.numbers(), self.upstream
        if spread is not None and up.d_linear is not None:
            spread = spread[: (2 if p.itself else 1) * chunk.shape[0] * chunk.pitch].zero_()
            pair_data, spec, *_, N, M = p.arguments
            kernels().cuda_similarity_reduce_spread(numbers, pair_data, spec, up.d_linear, N, M, spread)
        kernels().cuda_similarity_reduce_weigh(
            chunk.dots, chunk.guide, numbers, *p.arguments, up.values, up.argmax, up.d_values, up.d_target, spread,
            up.norm, weights if self.has_product else None, self.sums(p),
            chunk.dots.new_empty((chunk.parts(ROW_SLOTS, COL_SLOTS),)), self.totals,
        )  # fmt: skip
        self.multiply(p, chunk.rows, chunk.cols, chunk.matrix(weights))

    @property
    def has_product(self) -> bool:
        """Whether weights are multiplied."""
        return self.dx is not None or self.dy is not None

    def sums(self, p: Problem) -> list[int]:
        """What kernels are told of sums, of each: what, set, whether it is along columns, where in the totals."""
        begins, sums = 0, []
        for each in self.wanted.sums:
            sums += [int(each.what), each.set, int(each.cols), begins]
            begins += p.shape[each.cols]
        return sums

    def multiply(self, p: Problem, rows: slice, cols: slice, weights: Tensor) -> None:
        """Add the products of weights, which those of earlier rows and of columns before them precede."""
        if self.dx is not None:
            first = cols.start == 0 and not p.itself
            _products.set_or_add(self.dx[rows], weights, p.y[cols], add=not first)
        of_columns, first = (self.dx, False) if p.itself else (self.dy, rows.start == 0)
        if of_columns is not None:
            _products.set_or_add(of_columns[cols], weights.T, p.x[rows], add=not first)

    def finish(
        self, p: Problem, scale: Tensor, target: Tensor | None, needs: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, y, scale, row_bias, col_bias, empty where not needed."""
        sizes = [p.shape[each.cols] for each in self.wanted.sums]
        sums = dict(zip(self.wanted.sums, self.totals.split(sizes), strict=True))
        for gradient in (self.dx, self.dy):
            if gradient is not None and self.upstream.norm is not None:
                gradient /= self.upstream.norm
        self._give_back(p, target, sums)
        nothing = self.totals.new_zeros((0,), dtype=torch.float32)
        no_rows = nothing.view(0, p.shape[2])
        drow_bias, dcol_bias = (
            sums[Sum(SumOf.BIAS, cols)].float() if needs >> 3 + cols & 1 else nothing.clone() for cols in (False, True)
        )
        return (
            no_rows.clone() if self.dx is None else self.dx,
            no_rows.clone() if self.dy is None else self.dy,
            _scale_gradient(p, scale, sums) if needs >> 2 & 1 else nothing,
            drow_bias,
            dcol_bias,
        )

    def _give_back(self, p: Problem, target: Tensor | None, sums: dict[Sum, Tensor]) -> None:
        """Give back what rounding the weights took, along each row's target and each column's row.

        Near convergence a row's gradient is the small difference between its target and what lies close to it, where
        independent rounding errors of weights do not cancel. Then only differences of embeddings are weighted by them.
        """
        for cols, gradient, other in ((False, self.dx, p.y), (True, self.dy, p.x)):
            residual = sums.get(Sum(SumOf.RESIDUAL, cols))
            if target is None or gradient is None or residual is None:
                continue
            partner = dense(target)
            if cols:
                partner = target.new_full((p.shape[1],), -1)
                kernels().cuda_similarity_reduce_partners(dense(target), len(target), len(partner), partner)
            own, mates = p.layout.factors[::-1] if cols else p.layout.factors
            residual = residual if partner is None else with_factors(residual, partner, own, mates)
            kernels().cuda_similarity_reduce_give_back(gradient, residual, partner, other, *gradient.shape, len(other))


def _scale_gradient(p: Problem, scale: Tensor, sums: dict[Sum, Tensor]) -> Tensor:
    """The gradient of the scales of all sets, one after another."""
    found = [sums[_scale_sum(p, index)] for index in range(len(p.layout.sets))]
    if not found:
        return torch.zeros_like(scale)
    parts = [
        in_parts(each).reshape(1) if own.scale_of == ScaleOf.ALL else each
        for own, each in zip(p.layout.sets, found, strict=True)
    ]
    return torch.cat(parts, out=scale.new_empty((sum(map(len, parts)),), dtype=torch.float32))
