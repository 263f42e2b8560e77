"""How well a loss's positives rank, from the sweep that the loss makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import autocast
from ..core.folds import Fold
from ..core.records import changed
from ..core.results import named
from ..core.rule_kinds import listed_bounds
from ..core.rules import Pairs
from ._columns import partner_similarity, wide


@named
class Diagnostics(NamedTuple):
    """Ranking measures of one direction of a loss; detached, in float32 (float64 for float64 inputs).

    Attributes:
        accuracy: 0-d, the share of rows whose positive is more similar than every other pair that takes part.
        rank: (N,) int64, the place of each row's positive among the pairs that take part; 1 is the best. Ties, also
            those within the rounding error of an inner product, count against the positive.
        positive_similarity: 0-d, the mean inner product of a row and its positive, without scale.
        negative_similarity: 0-d, the mean inner product of all other pairs that take part; NaN where there are none.
    """

    accuracy: Tensor
    rank: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


class Ranking:
    """Which folds a loss adds to its sweep for `Diagnostics`, and how to read them.

    Args:
        x: (N, D) the rows.
        y: (M, D) the columns.
        positive: (N, D) the positive of each row, which is the target of the sweep; of the first N rows where there are
            more, which are negatives alone.
        pairs: the rules of the loss. Pairs that `fill` keeps as a constant do not count.
        also: rules of more columns, of which every pair obeys one of the two at most.
        own: (N, K) similarities of each row with columns that the sweep does not see, and which there are, if not all.
        both: also rank along the columns, where row i and column i belong together.
        unit: rows count as if they had length 1.
        biased: whether the sweep adds biases to its logits, which are no part of a similarity.
        sums_of_all: of `Sweep`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        positive: Tensor,
        pairs: Pairs | None = None,
        *,
        also: Pairs | None = None,
        own: tuple[Tensor, Tensor | None] | None = None,
        both: bool = False,
        unit: bool = False,
        biased: bool = False,
        sums_of_all: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        self._sums_of_all = sums_of_all
        with torch.no_grad(), autocast.disabled(x):
            x, y, positive = (wide(each.detach(), unit) for each in (x, y, positive))
            more, x_of_pairs = (x.shape[0] - positive.shape[0], y.shape[0] - positive.shape[0]), x[: positive.shape[0]]
            self.positive = partner_similarity(x_of_pairs, positive)
            # The positive comes from another order of summation than the sweep's inner products, so that equal
            # vectors may differ by rounding.
            slack = 8 * torch.finfo(self.positive.dtype).eps * partner_similarity(x_of_pairs.abs(), positive.abs())
            self.bound = self.positive - slack
            # Rows and columns that are no pairs have no positive, and nothing is above it.
            pad = torch.nn.functional.pad
            self._bounds = (
                pad(self.bound, (0, more[0]), value=torch.inf),
                pad(self.bound, (0, max(more[1], 0)), value=torch.inf),
            )
        self.own = None
        if own is not None:
            similarity = own[0].detach()
            self.own = similarity, torch.ones_like(similarity, dtype=torch.bool) if own[1] is None else own[1]
        self._all_pairs = self._sum_of_all(x, y) if pairs is None else None
        self._biased = biased and pairs is not None
        self.folds = self._folds(pairs, both)
        if also is not None:
            self.folds += self._folds(also, both)
        self._sets = 1 if also is None else 2

    def read(self, values: Sequence[Tensor], dim: int = 1) -> Diagnostics:
        """Return the measures from the results of `folds`, of the rows (dim=1) or of the columns (dim=0)."""
        size = len(values) // self._sets
        values = [torch.stack([each.detach() for each in values[at::size]]).sum(0) for at in range(size)]
        above, biases = values[1 - dim], values.pop().sum() if self._biased else 0.0
        total, count = (values[-2].sum() - biases, values[-1].sum()) if self._all_pairs is None else self._all_pairs
        if self.own is not None:
            similarity, keep = self.own
            above = above + ((similarity >= self.bound[:, None]) & keep).sum(1)
            total, count = total + similarity.masked_fill(~keep, 0.0).sum(), count + keep.sum()
        rank = above.to(torch.int64) + 1
        rows = torch.full_like(total, rank.numel())
        sums = torch.stack([(rank == 1).sum().to(total.dtype), self.positive.sum().to(total.dtype), total, count, rows])
        first, positive, total, count, rows = self._sums_of_all(sums).unbind()
        return Diagnostics(
            accuracy=first / rows,
            rank=rank,
            positive_similarity=positive / rows,
            negative_similarity=torch.where(count > 0, total / count, torch.nan),
        )

    def read_both(self, rows: Sequence[Tensor], cols: Sequence[Tensor]) -> tuple[Diagnostics, Diagnostics]:
        """The measures of the rows and of the columns of a sweep of both."""
        return self.read(rows), self.read(cols, dim=0)

    def _folds(self, pairs: Pairs | None, both: bool) -> tuple[Fold, ...]:
        rules = Pairs() if pairs is None else changed(pairs, fill=None, log_weight=None)
        folds: tuple[Fold, ...] = (_count_above(rules, self._bounds[0]),)
        if both:
            folds += (_count_above(rules, self._bounds[1][None]),)
        if self._all_pairs is None:
            folds += (Fold("sum", scale=1.0, pairs=rules), Fold("count", scale=1.0, pairs=rules))
        if self._biased:
            folds += (Fold("sum", scale=0.0, pairs=rules),)  # the biases alone
        return folds

    def _sum_of_all(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of all negatives where no rule drops any: linear in the similarities."""
        with torch.no_grad():
            total = (x.sum(0) * y.sum(0)).sum() - self.positive.sum()
            return total, torch.full_like(total, x.shape[0] * (y.shape[0] - 1))


def _count_above(rules: Pairs, bound: Tensor) -> Fold:
    """Count the pairs that are at least as similar as the positive."""
    return Fold("count", scale=1.0, pairs=changed(rules, above=listed_bounds(rules.above, bound)))
