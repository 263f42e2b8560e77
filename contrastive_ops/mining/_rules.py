"""Which columns are negatives of a query: margins and limits as bounds of `Pairs`, and what they drop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.rule_slices import each_bound
from ..core.rules import Bound, Guide, Pairs, check_lists
from ._positives import AGGREGATES, Positives, Scored, score

BASES = ("surviving", "raw")


@dataclass(frozen=True)
class NegativeRules:
    """Which documents of a corpus may be negatives of a query.

    Equivalent to, with the scores s of the documents and p of the positive::

        keep = (s <= p - absolute_margin) & (s <= p - p.abs() * relative_margin)
        keep &= (s >= min_score) & (s <= max_score)

    Every rule that is None keeps all. Scores are those of the metric: cosines are in [-1, 1], and "sqeuclidean" scores
    are minus the squared distance.

    Args:
        absolute_margin: a negative scores at least this much below the positive.
        relative_margin: a negative scores below the positive by at least this share of its size; 0.05 keeps what scores
            up to 95% of a positive p > 0.
        min_score: lowest score of a negative.
        max_score: highest score of a negative.
        positive_score: which score margins refer to where a query has several positives: "min", "max" or "mean".
        rank_window: (first, end) ranks that negatives come from, from 0 for the best. end None: first + num_negatives
            where the best are taken, first + 10 * num_negatives where negatives are drawn; with `near_duplicate` the
            window then grows until there are enough, unless ranks are raw.
        rank_basis: "surviving": ranks among the documents that pass all rules. "raw": ranks among all documents that
            are no positive and pass `pairs`; the other rules then apply inside the window, which may leave few.
        near_duplicate: documents that are more similar than this to a positive of the query, or to a negative that was
            taken before, are skipped. In units of the metric.

    Example:
        >>> NegativeRules(relative_margin=0.05, rank_window=(10, 100)).rank_basis
        'surviving'
    """

    absolute_margin: float | None = None
    relative_margin: float | None = None
    min_score: float | None = None
    max_score: float | None = None
    positive_score: str = "min"
    rank_window: tuple[int, int | None] = (0, None)
    rank_basis: str = "surviving"
    near_duplicate: float | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        for name in ("absolute_margin", "relative_margin", "min_score", "max_score", "near_duplicate"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checks.number("NegativeRules", name, value, "[-inf, inf]"))
        checks.check_choice("NegativeRules", "positive_score", self.positive_score, AGGREGATES)
        checks.check_choice("NegativeRules", "rank_basis", self.rank_basis, BASES)
        window = self.rank_window
        if not isinstance(window, tuple) or len(window) != 2:
            raise TypeError(f"NegativeRules: rank_window must be (first, end), got {checks.shown(window)}")
        first = checks.integer("NegativeRules", "rank_window[0]", window[0], 0)
        end = None if window[1] is None else checks.integer("NegativeRules", "rank_window[1]", window[1], first + 1)
        object.__setattr__(self, "rank_window", (first, end))

    @property
    def needs_positive(self) -> bool:
        """Whether a rule refers to the score of a positive."""
        return self.absolute_margin is not None or self.relative_margin is not None

    def upper(self, positive: Tensor) -> Tensor | None:
        """(N,) the highest score that a negative may have; -inf where that of the positive is NaN."""
        bounds = []
        if self.absolute_margin is not None:
            bounds.append(positive - self.absolute_margin)
        if self.relative_margin is not None:
            bounds.append(positive - positive.abs() * self.relative_margin)
        # A comparison with NaN keeps nothing, whereas Pairs lets everything pass.
        bounds = [bound.masked_fill(bound.isnan(), -torch.inf) for bound in bounds]
        if self.max_score is not None:
            bounds.append(torch.full_like(positive, self.max_score))
        return torch.stack(bounds).amin(0) if bounds else None


class Selection(NamedTuple):
    """The rules of a call.

    Attributes:
        ranked: which columns have a rank.
        kept: which columns are negatives; the same object where ranks are those of survivors.
        upper: (N,) bound that is left to apply to ranked columns, or None.
        lower: the same from below.
    """

    ranked: Pairs
    kept: Pairs
    upper: Tensor | None
    lower: float | None


def selection(
    function: str, rules: NegativeRules, pairs: Pairs | None, positives: Positives, positive: Tensor, columns: int
) -> Selection:
    """Bring margins, limits, positives and the rules of the user together.

    Args:
        function: the function to name in errors.
        rules: margins and limits.
        pairs: other rules.
        positives: columns that are excluded.
        positive: (N,) the score of each query's positives.
        columns: M.
    """
    if pairs is not None and not isinstance(pairs, Pairs):
        raise TypeError(f"{function}: pairs must be Pairs or None, got {type(pairs).__name__}")
    pairs = Pairs() if pairs is None else pairs
    for name in ("log_weight", "fill"):
        if getattr(pairs, name) is not None:
            raise ValueError(f"{function}: pairs.{name} must be None: it changes logits, and mining ranks similarities")
    guide = pairs.guide
    if guide is not None and guide.gy is None:
        guide = Guide(guide.gx, guide.gx, guide.below)  # stays whole where queries are searched again
    ranked = replace(
        pairs,
        diagonal=None,
        guide=guide,
        exclude=positives.excluded_with(*_excluded(function, pairs, positive, columns)),
    )
    upper, lower = rules.upper(positive), rules.min_score
    kept = replace(ranked, below=_joined(ranked.below, upper), above=_joined(ranked.above, lower))
    if rules.rank_basis == "raw":
        return Selection(ranked, kept, upper, lower)
    return Selection(kept, kept, None, None)


def _joined(bounds: Bound | tuple[Bound, ...] | None, more: Bound | None) -> tuple[Bound, ...] | None:
    listed = each_bound(bounds) + each_bound(more)
    return listed or None


def _excluded(function: str, pairs: Pairs, positive: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Lists of the columns that the user excludes: listed ones, and those on a diagonal."""
    rows, device = positive.shape[0], positive.device
    indptr = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    index = indptr[:0]
    if pairs.exclude is not None:
        shapes = positive.new_empty((rows, 0)), positive.new_empty((columns, 0))
        indptr, index = check_lists(function, "pairs.exclude", pairs.exclude, *shapes)[:2]
    if pairs.diagonal is not None:
        own = torch.arange(rows, device=device) + pairs.diagonal
        row = torch.cat([torch.repeat_interleave(indptr.diff()), torch.arange(rows, device=device)])
        index = torch.cat([index, own])
        inside = (index >= 0) & (index < columns)
        row, index = row[inside], index[inside]
        order = row.argsort(stable=True)
        indptr = torch.cat([indptr[:1], torch.bincount(row, minlength=rows).cumsum(0)])
        index = index[order]
    return indptr, index


def dropped_positives(
    function: str, kept: Pairs, positives: Positives, scored: Scored, backend: str
) -> dict[str, Tensor]:
    """(N,) int64 by the name of each rule: how many positives of a query it would drop."""
    row, index = positives.row, positives.column
    drops: dict[str, Tensor] = {}
    for name, ids, when_equal in (("differ", kept.differ, True), ("same", kept.same, False)):
        if ids is not None:
            equal = (ids[0][row] == ids[1][index]) & (ids[0][row] != -1)
            drops[name] = equal == when_equal
    drops["below"] = _outside(scored.values, kept.below, row, index, torch.gt)
    drops["above"] = _outside(scored.values, kept.above, row, index, torch.lt)
    if kept.guide is not None:
        gx, gy, dtype = kept.guide.gx.detach(), kept.guide.gy, scored.values.dtype
        take = lambda at: gy[at].detach().to(dtype)  # type: ignore[index]  # noqa: E731
        similarity = score(function, gx.to(dtype), take, positives, "dot", backend)
        drops["guide"] = _outside(similarity.values, kept.guide.below, row, index, torch.gt)
    rows = len(positives.indptr) - 1
    return {name: torch.bincount(row[drop], minlength=rows) for name, drop in drops.items()}


def _outside(
    similarity: Tensor,
    bounds: Bound | tuple[Bound, ...] | None,
    row: Tensor,
    index: Tensor,
    exceeds: Callable[[Tensor, Tensor | float], Tensor],
) -> Tensor:
    outside = torch.zeros_like(similarity, dtype=torch.bool)
    for bound in each_bound(bounds):
        if isinstance(bound, Tensor):
            bound = bound.detach().to(similarity.dtype)
            if bound.dim():
                by_column = bound.dim() == 2 and bound.shape[0] == 1
                bound = bound[0][index] if by_column else bound.reshape(-1)[row]
        outside |= exceeds(similarity, bound)
    return outside
