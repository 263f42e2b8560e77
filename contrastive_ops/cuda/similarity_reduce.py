"""similarity_reduce by library products and CUDA kernels: forward, backward and total as the operators take them.

A library multiplies a chunk of rows with a chunk of columns. Behind each product a kernel folds
rows and columns, or turns inner products into the weights of the products that gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.cuda_kernels import kernels
from ..core.problem import KINDS
from ..reference.row_losses import Terms, kind_of, row_losses, weighted_slopes
from ._chunks import Chunk, Memory, Problem, Sizes, Workspace, padded
from ._weights import Gradients, Upstream, Wanted

# `total` holds the inner products of a band of rows, all columns of it, in so many bytes; bands of fewer rows would
# read and write all of dy for too little, and forward and backward run one after the other.
HELD_BYTES = 512 << 20
LEAST_HELD_ROWS = 256


class Folding(NamedTuple):
    """Results of forward while they are formed.

    Attributes:
        state: of all folds, as csrc/cuda/similarity_folds.h has it; float64.
        target_logit: (N,), empty without targets.
        linear: (N,) float64, empty without lists.
    """

    state: Tensor
    target_logit: Tensor
    linear: Tensor

    @classmethod
    def of(cls, p: Problem, target: Tensor | None) -> Folding:
        """Folds of nothing."""
        N, M, _ = p.shape
        state = p.x.new_zeros((2 * sum(p.layout.sizes(N, M)),), dtype=torch.float64)
        # A target that no column is stays NaN, as nobody waits for the GPU to check it.
        target_logit = state.new_full((0 if target is None else N,), torch.nan, dtype=torch.float32)
        return cls(state, target_logit, state.new_zeros((N if p.layout.has_linear else 0,)))

    def add(self, p: Problem, chunk: Chunk) -> None:
        """Fold a chunk."""
        parts, numbers = chunk.dots.new_empty((chunk.parts(2, 2),)), chunk.numbers()
        kernels().cuda_similarity_reduce_fold(chunk.dots, chunk.guide, numbers, *p.arguments, parts, self.state)
        named = [each if len(each) else None for each in (self.target_logit, self.linear)]
        if any(each is not None for each in named):
            kernels().cuda_similarity_reduce_named(chunk.dots, numbers, *p.arguments, *named)

    def finish(self, p: Problem) -> tuple[Tensor, Tensor]:
        """Values and winners of all folds."""
        N, M, _ = p.shape
        sizes, argmax_sizes = p.layout.sizes(N, M), p.layout.argmax_sizes(N, M)
        values = self.target_logit.new_empty((sum(sizes),))
        argmax = values.new_empty((sum(argmax_sizes),), dtype=torch.int64)
        states = self.state.split([2 * size for size in sizes])
        for fold, state, value, winner in zip(
            p.layout.folds, states, values.split(sizes), argmax.split(argmax_sizes), strict=True
        ):
            _finish(fold.kind, state, value, winner if fold.kind == "max" else None)
        return values, argmax


def _finish(kind: str, state: Tensor, value: Tensor, winner: Tensor | None) -> None:
    kernels().cuda_similarity_reduce_finish(state, KINDS.index(kind), len(value), value, winner)


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (folds, argmax, target_logit, linear, kept); what was not asked for is empty.

    `kept` is empty as well where memory ran out, and backward computes inner products again.
    """
    p = Problem.of(x, y, scale, row_bias, col_bias, target, pair_data, spec)
    work = Workspace(p)
    kept = work.dots.new_empty((kept_size if work.usual else 0,))
    folding, memory = Folding.of(p, target), Memory(kept)
    for band in work.sizes.bands(p):
        for rows, cols in band:
            folding.add(p, work.chunk(rows, cols, memory))
    return *folding.finish(p), folding.target_logit, folding.linear.float(), kept


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    folds: Tensor,
    argmax: Tensor,
    d_folds: Tensor | None,
    d_target: Tensor | None,
    d_linear: Tensor | None,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32, empty where not needed."""
    p = Problem.of(x, y, scale, row_bias, col_bias, target, pair_data, spec)
    wanted = Wanted.of(p, target, needs)
    upstream = Upstream.of(p, scale, folds, argmax, d_folds, d_target, d_linear)
    spread = () if d_linear is None else ((2 if p.itself else 1, torch.float32),)
    work = Workspace(p, (1, x.dtype), *spread)
    memory = Memory(kept if work.usual else kept[:0])
    gradients = Gradients.of(p, wanted, upstream)
    for band in work.sizes.bands(p):
        for rows, cols in band:
            chunk = work.chunk(rows, cols, memory, filled=True)
            gradients.add(p, chunk, *work.buffers)
    return gradients.finish(p, scale, target, needs)


def total(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    weight: Tensor,
    extra: Tensor | None,
    target_weight: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    problem = (x, y, scale, row_bias, col_bias, target, pair_data, spec)
    p = Problem.of(*problem)
    kind = kind_of(p.layout)
    held = _held(p)
    if held is not None:
        losses_of = RowLosses.of(p, kind, weight, extra, target_weight)
        return _total_by_bands(p, scale, target, losses_of, needs, *held)
    fold, argmax, target_logit, _, kept = forward(*problem, 0)
    losses = row_losses(kind, (fold,), target_logit, Terms(extra=extra))
    d_fold, d_target, dextra = weighted_slopes(kind, fold, target_logit, weight, extra, target_weight)
    gradients = backward(*problem, fold, argmax, d_fold, d_target, None, kept, needs)
    return losses, target_logit, *gradients, dextra


# ---- The weighted total, every inner product once --------------------------------------------------------------------


def _held(p: Problem) -> tuple[Sizes, Tensor] | None:
    """Chunks and memory for the inner products of a band of rows, or None where a band would not be worth it."""
    N, M, _ = p.shape
    if p.itself or N == 0 or M == 0:  # with itself a row is complete only after the last band
        return None
    usual = Sizes.of(p)
    rows = min(usual.rows, HELD_BYTES // (4 * M))
    if rows < min(LEAST_HELD_ROWS, N):
        return None
    sizes = Sizes(rows, usual.cols)
    numbers = sum(rows * padded(j.stop - j.start) for _, j in next(sizes.bands(p)))
    try:
        return sizes, p.x.new_empty((numbers,), dtype=torch.float32)
    except torch.OutOfMemoryError:
        return None


class RowLosses(NamedTuple):
    """The losses of rows and their slopes, filled in as rows are complete."""

    kind: str
    weight: Tensor
    extra: Tensor | None
    target_weight: Tensor | None
    fold: Tensor
    losses: Tensor
    d_fold: Tensor
    d_target: Tensor
    dextra: Tensor

    @classmethod
    def of(cls, p: Problem, kind: str, weight: Tensor, extra: Tensor | None, target_weight: Tensor | None) -> RowLosses:
        """Room for all rows."""
        fold, losses, d_fold, d_target = (p.x.new_empty((len(p.x),), dtype=torch.float32) for _ in range(4))
        dextra = torch.empty_like(fold[:0] if extra is None else fold)
        return cls(kind, weight, extra, target_weight, fold, losses, d_fold, d_target, dextra)

    def fill(self, rows: slice, target_logit: Tensor) -> None:
        """From the folds and the targets' logits of these rows."""
        extra, target_weight = (None if t is None else t[rows] for t in (self.extra, self.target_weight))
        fold, logit = self.fold[rows], target_logit[rows]
        self.losses[rows] = row_losses(self.kind, (fold,), logit, Terms(extra=extra))
        slopes = weighted_slopes(self.kind, fold, logit, self.weight[rows], extra, target_weight)
        for whole, part in zip((self.d_fold, self.d_target, self.dextra), slopes, strict=True):
            whole[rows if len(whole) else slice(0)] = part

    def complete(self, p: Problem, rows: slice, folding: Folding) -> None:
        """These rows have been folded with all columns."""
        _finish(p.layout.folds[0].kind, folding.state[2 * rows.start : 2 * rows.stop], self.fold[rows], None)
        self.fill(rows, folding.target_logit)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """No smaller than what arrives at the folds and the targets: no slope is larger than its row's weight."""
        most = self.weight.abs()
        return most, most if self.target_weight is None else most + self.target_weight.abs()


def _total_by_bands(
    p: Problem, scale: Tensor, target: Tensor, of_rows: RowLosses, needs: int, sizes: Sizes, held: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A band of rows is folded, and weighed once its rows are complete."""
    folding, work = Folding.of(p, target), Workspace(p, (1, p.x.dtype), sizes=sizes, holds=True)
    no_winner = target.new_empty((0,))
    bounds = Upstream.of(p, scale, of_rows.fold, no_winner, *of_rows.bounds(), None)
    upstream = bounds._replace(d_values=of_rows.d_fold, d_target=of_rows.d_target)
    gradients = Gradients.of(p, Wanted.of(p, target, needs), upstream)
    for band in work.sizes.bands(p):
        memory = Memory(held)
        for rows, cols in band:
            folding.add(p, work.chunk(rows, cols, memory))
        rows = band[0][0]
        of_rows.complete(p, rows, folding)
        memory = Memory(held)
        for _, cols in band:
            gradients.add(p, work.chunk(rows, cols, memory, filled=True), *work.buffers)
    return of_rows.losses, folding.target_logit, *gradients.finish(p, scale, target, needs), of_rows.dextra
