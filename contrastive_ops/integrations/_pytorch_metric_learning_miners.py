"""pytorch-metric-learning's miners, and the memory of earlier batches, without lists of all pairs.

A miner of pairs says by rules which pairs it picks: labels that are equal or not, bounds on the similarity. `Picked`
holds the rules, and makes lists when somebody reads it; the losses of `pytorch_metric_learning` fold by the rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.records import changed
from ..core.unit_rows import unit_rows
from ..ops import Fold, Pairs, similarity_reduce
from ._originals import runs_original, third_party

INSTALL = "pytorch-metric-learning"
losses = third_party("pytorch_metric_learning.losses", INSTALL)
miners = third_party("pytorch_metric_learning.miners", INSTALL)
distances = third_party("pytorch_metric_learning.distances", INSTALL)
utils = third_party("pytorch_metric_learning.utils.loss_and_miner_utils", INSTALL)

# Similarities that are inner products.
PRODUCTS = (distances.CosineSimilarity, distances.DotProductSimilarity)
# Numbers of a block of similarities that is made to list its pairs.
BLOCK_ELEMENTS = 1 << 22
# In place of the label -1.
UNUSED_LABEL = -(1 << 62)


def unfused_distance(distance: Any) -> str:
    """Say which distance is no inner product; empty where it is one."""
    plain = type(distance) in PRODUCTS and distance.p == 2 and distance.power == 1 and not distance.collect_stats
    return "" if plain else f"distance={type(distance).__name__}"


def classes(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as rules take them: -1 is a class here and no label there."""
    rows = labels.long().masked_fill(labels == -1, UNUSED_LABEL)
    same = ref_labels is labels
    return rows, rows if same else ref_labels.long().masked_fill(ref_labels == -1, UNUSED_LABEL)


class Picked(Sequence[Tensor]):
    """Pairs that rules pick, as (anchors, positives, anchors, negatives), which are listed when they are read.

    Attributes:
        given: (N, D) embeddings and (M, D) those that they are compared with.
        alone: whether both are the same.
        normalize: whether the distance takes rows of length 1.
        positives: rules of the positives.
        negatives: rules of the negatives.
        own: (N,) the place of each row among those that it is compared with, where it is one of them and not picked.
    """

    def __init__(self, distance: Any, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> None:
        self.given, self.normalize = (embeddings, ref_emb), distance.normalize_embeddings
        self.alone = ref_emb is embeddings and ref_labels is labels
        ids = classes(labels, ref_labels)
        self.positives = Pairs(same=ids, diagonal=0 if self.alone else None)
        self.negatives = Pairs(differ=ids)
        self.own: Tensor | None = None
        self._lists: tuple[Tensor, ...] | None = None

    def suits(self, distance: Any, embeddings: Tensor, ref_emb: Tensor) -> bool:
        """Whether the rules say of these embeddings what they said of those of the miner."""
        same = (
            mine.data_ptr() == theirs.data_ptr() and mine.shape == theirs.shape
            for mine, theirs in zip(self.given, (embeddings, ref_emb), strict=True)
        )
        return all(same) and not unfused_distance(distance) and distance.normalize_embeddings == self.normalize

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Both sides as the sweeps take them, with a graph where there is one: miners run without."""
        x, y = self.given
        x = unit_rows(x) if self.normalize else x
        return x, None if self.alone else unit_rows(y) if self.normalize else y

    def fold(self, *folds: str | Fold, **options: Any) -> Any:
        """`similarity_reduce` of the rows."""
        return similarity_reduce(*self.rows(), reduce=folds, target=self.own, **options)

    def lists(self) -> tuple[Tensor, ...]:
        """The four lists."""
        if self._lists is None:
            with torch.no_grad():
                x, other = self.rows()
            y = x if other is None else other
            step = max(1, BLOCK_ELEMENTS // max(len(y), 1))
            found: list[tuple[Tensor, ...]] = []
            for begin in range(0, max(len(x), 1), step):
                block = x[begin : begin + step].detach() @ y.detach().T
                rows = torch.arange(begin, begin + len(block), device=block.device)
                kept = [_kept(pairs, block, rows) for pairs in (self.positives, self.negatives)]
                if self.own is not None:
                    kept[0][rows - begin, self.own[rows]] = False  # its label is that of the row
                listed = [each.nonzero().unbind(1) for each in kept]
                found.append(tuple(part for row, column in listed for part in (row + begin, column)))
            self._lists = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        return self._lists

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        return self.lists()[index]


def _kept(pairs: Pairs, block: Tensor, rows: Tensor) -> Tensor:
    """Which pairs of some rows obey the rules that miners use."""
    kept = torch.ones_like(block, dtype=torch.bool)
    if pairs.same is not None:
        kept &= pairs.same[0][rows, None] == pairs.same[1]
    if pairs.differ is not None:
        kept &= pairs.differ[0][rows, None] != pairs.differ[1]
    if pairs.diagonal is not None:
        kept &= rows[:, None] + pairs.diagonal != torch.arange(block.shape[1], device=rows.device)
    bounds: Any = ((pairs.below, 1), (pairs.above, -1))
    for bound, sign in bounds:
        if isinstance(bound, Tensor):
            kept &= sign * block <= sign * bound[rows, None]
        elif bound is not None:
            kept &= sign * block <= sign * bound
    return kept


def _inside(bound: Tensor, direction: float) -> Tensor:
    """Rules keep what equals a bound, miners do not."""
    return torch.nextafter(bound, torch.full_like(bound, direction))


@functools.cache
def inside_number(bound: float, direction: float, dtype: torch.dtype) -> float:
    """The next number of the precision in which similarities are compared."""
    return float(_inside(torch.tensor(bound, dtype=dtype), direction))


class _PairMiner:
    """What the miners of pairs share."""

    def output_assertion(self, output: Any) -> None:
        """Count pairs where somebody asks for numbers."""
        miner: Any = self
        if miner.collect_stats or not isinstance(output, Picked):
            original: Any = super()
            original.output_assertion(output)


class MultiSimilarityMiner(_PairMiner, miners.MultiSimilarityMiner):
    """`pytorch_metric_learning.miners.MultiSimilarityMiner`: two extrema of a row, and bounds, in place of sorting.

    Args:
        epsilon: how far beyond the hardest pair of the other kind a pair may be.
        **kwargs: as of the original, which runs with a distance that is no inner product.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Return the rules of the pairs."""
        if reason := unfused_distance(self.distance):
            runs_original(self, reason)
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        picked = Picked(self.distance, embeddings, labels, ref_emb, ref_labels)
        folds = Fold("max", pairs=picked.positives, negate=True), Fold("max", pairs=picked.negatives)
        farthest, nearest = picked.fold(*folds).rows
        below = _inside(nearest + self.epsilon, -torch.inf)
        picked.positives = changed(picked.positives, below=below)
        picked.negatives = changed(picked.negatives, above=_inside(-farthest - self.epsilon, torch.inf))
        return picked


class PairMarginMiner(_PairMiner, miners.PairMarginMiner):
    """`pytorch_metric_learning.miners.PairMarginMiner`: two bounds in place of lists.

    Args:
        pos_margin: positives are at a larger distance, or less similar.
        neg_margin: negatives are at a smaller distance, or more similar.
        **kwargs: as of the original, which runs with a distance that is no inner product.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Return the rules of the pairs."""
        if reason := unfused_distance(self.distance) or ("collect_stats" if self.collect_stats else ""):
            runs_original(self, reason)
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        picked = Picked(self.distance, embeddings, labels, ref_emb, ref_labels)
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        low = inside_number(float(self.pos_margin), -torch.inf, dtype)
        high = inside_number(float(self.neg_margin), torch.inf, dtype)
        picked.positives, picked.negatives = changed(picked.positives, below=low), changed(picked.negatives, above=high)
        return picked


class BatchEasyHardMiner(miners.BatchEasyHardMiner):
    """`pytorch_metric_learning.miners.BatchEasyHardMiner`: the extrema of each row, by one sweep or by two.

    Args:
        *args: as of the original, which runs where a strategy is "all", with allowed ranges, and with a distance that
            does not order pairs as an inner product does.
        **kwargs: the same.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Return anchors, positives, the same anchors and negatives."""
        distance, strategies = self.distance, (self.pos_strategy, self.neg_strategy)
        reason = unfused_distance(distance)
        if type(distance) is distances.LpDistance and distance.p == 2 and distance.power > 0:
            # Between rows of length 1 the distance falls as the cosine grows.
            reason = "" if distance.normalize_embeddings else "distance=LpDistance(normalize_embeddings=False)"
        if self.ALL in strategies:
            reason = "a strategy 'all'"
        elif self.allowed_pos_range is not None or self.allowed_neg_range is not None:
            reason = "an allowed range"
        if reason:
            runs_original(self, reason)
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        picked = Picked(distance, embeddings, labels, ref_emb, ref_labels)
        positive = Fold("max", pairs=picked.positives, negate=self.pos_strategy != self.EASY)
        negative = Fold("max", pairs=picked.negatives, negate=self.neg_strategy == self.EASY)
        if self.SEMIHARD not in strategies:
            found = picked.fold(positive, negative).row_argmax
        elif self.neg_strategy == self.SEMIHARD:
            first = picked.fold(positive)
            known = -first.rows[0] if positive.negate else first.rows[0]
            negative = changed(negative, pairs=changed(picked.negatives, below=_inside(known, -torch.inf)))
            found = first.row_argmax[0], picked.fold(negative).row_argmax[0]
        else:
            first = picked.fold(negative)
            known = -first.rows[0] if negative.negate else first.rows[0]
            positive = changed(positive, pairs=changed(picked.positives, above=_inside(known, torch.inf)))
            found = picked.fold(positive).row_argmax[0], first.row_argmax[0]
        a = ((found[0] >= 0) & (found[1] >= 0)).nonzero().flatten()
        p, n = found[0][a], found[1][a]
        if self.collect_stats:
            anchor, *others = (distance.maybe_normalize(each) for each in (embeddings[a], ref_emb[p], ref_emb[n]))
            self.set_stats(*(distance.pairwise_distance(anchor, each) ** distance.power for each in others))
        return a, p, a, n


class BatchHardMiner(miners.BatchHardMiner, BatchEasyHardMiner):
    """`pytorch_metric_learning.miners.BatchHardMiner` on `BatchEasyHardMiner` of this module."""


class TripletMarginMiner(miners.TripletMarginMiner):
    """`pytorch_metric_learning.miners.TripletMarginMiner` without an N x M x M mask: triplets of some pairs at a time.

    Args:
        margin: the triplets of which the margin is at most this.
        type_of_triplets: "all", "hard", "semihard" or "easy".
        **kwargs: as of the original, which runs with `collect_stats`.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Return anchors, positives and negatives, in the order of the original."""
        if self.collect_stats:
            runs_original(self, "collect_stats")
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        matrix = self.distance(embeddings, ref_emb)
        matches, others = (each.bool() for each in utils.get_matches_and_diffs(labels, ref_labels))
        anchor, positive = matches.nonzero().unbind(1)
        step, found = max(1, BLOCK_ELEMENTS // max(matrix.shape[1], 1)), []
        for begin in range(0, max(len(anchor), 1), step):
            a, p = anchor[begin : begin + step], positive[begin : begin + step]
            apart = (
                matrix[a, p][:, None] - matrix[a] if self.distance.is_inverted else matrix[a] - matrix[a, p][:, None]
            )
            kept = others[a] & (apart > self.margin if self.type_of_triplets == "easy" else apart <= self.margin)
            if self.type_of_triplets in ("hard", "semihard"):
                kept &= apart <= 0 if self.type_of_triplets == "hard" else apart > 0
            pair, n = kept.nonzero().unbind(1)
            found.append((a[pair], p[pair], n))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


class CrossBatchMemory(losses.CrossBatchMemory):
    """`pytorch_metric_learning.losses.CrossBatchMemory` without lists of all pairs of the batch and the memory.

    Args:
        loss: one of this module, whose sweep takes the rules of `miner`, or of all pairs; the lists of the original are
            made for others.
        *args: as of the original.
        **kwargs: the same.
    """

    def create_indices_tuple(  # noqa: D102, PLR0917 - the original's own arguments
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, given: Any, no_copies: bool
    ) -> Any:
        distance = getattr(self.loss, "distance", None)
        takes_rules = hasattr(self.loss, "folded") and given is None and not labels.is_floating_point()
        if not takes_rules or unfused_distance(distance):
            return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, given, no_copies)
        if self.miner:
            picked = self.miner(embeddings, labels, E_mem, L_mem)
        else:
            picked = Picked(distance, embeddings, labels, E_mem, L_mem)
        if not no_copies:
            return picked
        if not isinstance(picked, Picked):
            return utils.remove_self_comparisons(picked, self.curr_batch_idx, self.memory_size)
        picked.own = self.curr_batch_idx
        return picked
