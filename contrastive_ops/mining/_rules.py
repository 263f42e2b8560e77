"""Which columns are negatives of a query: margins and limits as bounds of `Pairs`, and what they drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.column_lists import check_lists, with_own_column
from ..core.records import changed
from ..core.rule_kinds import Data, Places, listed_bounds
from ..core.rules import RULES, Guide, GuideRule, Pairs, resolve
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
            window then grows until there are enough, unless ranks are raw. Two floats are shares of the corpus.
        rank_basis: "surviving": ranks among the documents that pass all rules. "raw": ranks among all documents that
            are no positive and pass `pairs`; the other rules then apply inside the window, which may leave few.
        near_duplicate: documents that are more similar than this to a positive of the query, or to a negative that was
            taken before, are skipped. In units of the metric.

    Examples:
        >>> NegativeRules(relative_margin=0.05, rank_window=(10, 100)).rank_basis
        'surviving'
    """

    absolute_margin: float | None = None
    relative_margin: float | None = None
    min_score: float | None = None
    max_score: float | None = None
    positive_score: str = "min"
    rank_window: tuple[int, int | None] | tuple[float, float] = (0, None)
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
        if isinstance(window[0], float) or isinstance(window[1], float):
            low = checks.number("NegativeRules", "rank_window[0]", window[0], "[0, 1]")
            high = checks.number("NegativeRules", "rank_window[1]", window[1], "[0, 1]")
            if not low < high:
                raise ValueError(f"NegativeRules: rank_window must be two rising shares, got {low} and {high}")
            object.__setattr__(self, "rank_window", (low, high))
            return
        first = checks.integer("NegativeRules", "rank_window[0]", window[0], 0)
        end = None if window[1] is None else checks.integer("NegativeRules", "rank_window[1]", window[1], first + 1)
        object.__setattr__(self, "rank_window", (first, end))

    def window(self, rows: int) -> tuple[int, int | None]:
        """The ranks, of a corpus of this many rows; at least one."""
        first, end = self.rank_window
        if isinstance(end, float):
            first = min(int(first * rows), max(rows - 1, 0))
            return first, max(int(end * rows), first + 1)
        return int(first), end

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
    for name in (rule.name for rule in RULES.values() if not rule.drops):
        if getattr(pairs, name) is not None:
            raise ValueError(f"{function}: pairs.{name} must be None: it changes logits, and mining ranks similarities")
    guide = pairs.guide
    if guide is not None and guide.gy is None:
        guide = Guide(guide.gx, guide.gx, guide.below)  # stays whole where queries are searched again
    ranked = changed(
        pairs,
        diagonal=None,
        guide=guide,
        exclude=positives.excluded_with(*_excluded(function, pairs, positive, columns)),
    )
    upper, lower = rules.upper(positive), rules.min_score
    below, above = listed_bounds(ranked.below, upper), listed_bounds(ranked.above, lower)
    kept = changed(ranked, below=below or None, above=above or None)
    if rules.rank_basis == "raw":
        return Selection(ranked, kept, upper, lower)
    return Selection(kept, kept, None, None)


def _excluded(function: str, pairs: Pairs, positive: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Lists of the columns that the user excludes: listed ones, and those on a diagonal."""
    rows, lists = positive.shape[0], None
    if pairs.exclude is not None:
        shapes = positive.new_empty((rows, 0)), positive.new_empty((columns, 0))
        lists = check_lists(function, "pairs.exclude", pairs.exclude, *shapes)[:2]
    own = torch.arange(rows, device=positive.device)
    return with_own_column(lists, own + (columns if pairs.diagonal is None else pairs.diagonal), columns)


def dropped_positives(
    function: str, kept: Pairs, positives: Positives, scored: Scored, like: tuple[Tensor, Tensor], backend: str
) -> dict[str, Tensor]:
    """(N,) int64 by the name of each rule: how many positives of a query it would drop.

    `like` are matrices of N and of M rows.
    """
    row, index, dtype = positives.row, positives.column, scored.values.dtype

    def guide_similarity(data: Data) -> Tensor:
        gx, gy = kept.guide.gx.detach(), kept.guide.gy  # type: ignore[union-attr]
        take = lambda at: gy[at].detach().to(dtype)  # type: ignore[index]  # noqa: E731
        return score(function, gx.to(dtype), take, positives, "dot", backend).values

    places = Places(row, index, scored.values, guide_similarity)
    # The guide's matrices stay where they are: of a large corpus only some rows are needed.
    counted = [rule for rule in RULES.values() if rule.counted]
    plain = [rule for rule in counted if rule.name != "guide"]
    data = resolve(function, kept, *like, plain)
    if kept.guide is not None:
        data.update(GuideRule.bounds.encode(function, kept.guide.below, *like))
    drops = {rule.name: rule.mask(data, places) for rule in counted if rule.is_in(data)}
    rows = len(positives.indptr) - 1
    return {name: torch.bincount(row[drop], minlength=rows) for name, drop in drops.items()}
