"""pytorch-metric-learning's losses on fused kernels.

    from contrastive_ops.integrations.pytorch_metric_learning import ArcFaceLoss, SupConLoss

    loss = SupConLoss(temperature=0.1)(embeddings, labels)
    miner = MultiSimilarityMiner()
    loss = MultiSimilarityLoss()(embeddings, labels, miner(embeddings, labels))

Reducers, regularisers and wrappers of the package work as before. A miner of this module says by rules which pairs it
picks, and a loss of this module folds them in its sweep; other losses read the same pairs as lists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.numerics import softplus
from ..core.records import changed
from ..losses import arc_face, cos_face, multi_positive_info_nce, multi_similarity, sup_con
from ..ops import Fold, Pairs
from ._originals import runs_original, third_party
from ._pytorch_metric_learning_miners import (
    INSTALL,
    BatchEasyHardMiner,
    BatchHardMiner,
    CrossBatchMemory,
    MultiSimilarityMiner,
    PairMarginMiner,
    Picked,
    TripletMarginMiner,
    classes,
    distances,
    inside_number,
    losses,
    miners,
    unfused_distance,
    utils,
)

__all__ = [
    "ArcFaceLoss",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NTXentLoss",
    "PairMarginMiner",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletMarginMiner",
]

reducers = third_party("pytorch_metric_learning.reducers", INSTALL)
# A triplet's rows are read and its gradients written where they are; a pair of a matrix product costs so much less.
PAIRS_PER_TRIPLET = 32
# Whose matrix is made: 32 KiB.
FEW_PAIRS = 8192


class _PairLoss:
    """What the pair losses share: how rules come to the primitives, and when lists are needed."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Return losses as reducers take them."""
        loss: Any = self
        original: Any = super()
        everything = embeddings, labels, indices_tuple, ref_emb, ref_labels
        rules = isinstance(indices_tuple, Picked) and indices_tuple.suits(loss.distance, embeddings, ref_emb)
        reason = unfused_distance(loss.distance) or self.unfused()
        if indices_tuple is not None and not rules:
            reason = reason or "indices_tuple that no miner of contrastive_ops made"
        if labels is not None and labels.is_floating_point():
            reason = f"labels of {labels.dtype}"
        if reason:
            runs_original(loss, reason)
            return original.compute_loss(*everything)
        if labels is None or len(embeddings) * len(ref_emb) < 4:  # an error, and pairs that the original counts as none
            return original.compute_loss(*everything)
        if rules:
            return self.folded(indices_tuple)
        return self.of_all_pairs(embeddings, labels, ref_emb, ref_labels)

    def unfused(self) -> str:
        """Say which option has no fused form."""
        return ""

    def folded(self, picked: Picked) -> Any:
        """The loss of the pairs that rules pick."""
        raise NotImplementedError

    def of_all_pairs(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """The loss of all pairs."""
        loss: Any = self
        return self.folded(Picked(loss.distance, embeddings, labels, ref_emb, ref_labels))

    def _arguments(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> dict[str, Any]:
        rows, columns = classes(labels, ref_labels)
        loss: Any = self
        arguments = {"x": embeddings, "labels": rows}
        if ref_emb is not embeddings or ref_labels is not labels:
            arguments |= {"y": ref_emb, "col_labels": columns}
        return arguments | {"normalize": loss.distance.normalize_embeddings}


def _of_rows(rows: Tensor) -> dict[str, Any]:
    indices = torch.arange(len(rows), device=rows.device)
    return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}


def _reduced(**values: Tensor) -> dict[str, Any]:
    return {
        name: {"losses": each, "indices": None, "reduction_type": "already_reduced"} for name, each in values.items()
    }


class SupConLoss(_PairLoss, losses.SupConLoss):
    """`pytorch_metric_learning.losses.SupConLoss` without a matrix of similarities or of pairs.

    Equivalent to: see `contrastive_ops.losses.sup_con`, one loss a row, which the reducer gets.

    Args:
        temperature: divides the similarities.
        **kwargs: `distance`, `reducer`, `embedding_regularizer`, ...; the original runs with a distance that is no
            inner product and with pairs from other miners than those of this module.
    """

    def of_all_pairs(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """The loss of all pairs."""
        if not labels.numel() or not (labels[:1] != ref_labels).any() and not (labels != labels[:1]).any():
            return self.zero_losses()  # one class: there are no negatives, and the original says 0
        arguments = self._arguments(embeddings, labels, ref_emb, ref_labels)
        return _of_rows(sup_con(**arguments, temperature=self.temperature, reduction="none"))

    def folded(self, picked: Picked) -> Any:
        """The loss of the pairs that rules pick."""
        scale, of_same = 1.0 / self.temperature, picked.positives
        folds = "logsumexp", "sum", "count", Fold("logsumexp", pairs=picked.negatives)
        lse, total, count, others = picked.fold(*folds, scale=scale, pairs=of_same).rows
        count = count.detach()
        alone = (count == 0) | (others == -torch.inf).all()  # without any negative the original says 0
        rows = torch.logaddexp(lse.masked_fill(alone, 0.0), others) - total / count.clamp_min(1.0)
        return _of_rows(rows.masked_fill(alone, 0.0))


class NTXentLoss(_PairLoss, losses.NTXentLoss):
    """`pytorch_metric_learning.losses.NTXentLoss` without a matrix of similarities or of pairs.

    Equivalent to: see `contrastive_ops.losses.multi_positive_info_nce` with ``mean_over="pairs"``. Probabilities below
    1e-7 keep their digits, where the original stops.

    Args:
        temperature: divides the similarities.
        **kwargs: `distance`, `reducer`, `embedding_regularizer`, ...; the original runs with a distance that is no
            inner product, with a reducer that is no mean of all pairs, and with pairs from other miners than those of
            this module.
    """

    def unfused(self) -> str:
        """Say which option has no fused form."""
        return "" if type(self.reducer) is reducers.MeanReducer else f"reducer={type(self.reducer).__name__}"

    def of_all_pairs(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """The loss of all pairs."""
        arguments = self._arguments(embeddings, labels, ref_emb, ref_labels)
        return _reduced(loss=multi_positive_info_nce(**arguments, temperature=self.temperature, mean_over="pairs"))

    def folded(self, picked: Picked) -> Any:
        """The loss of the pairs that rules pick."""
        scale, of_same = 1.0 / self.temperature, picked.positives
        (others,) = picked.fold(Fold("logsumexp", scale, picked.negatives)).rows
        alone = others == -torch.inf
        bias = -others.masked_fill(alone, 0.0)
        folds = Fold("sum_softplus", pairs=of_same, negate=True), Fold("count", pairs=of_same)
        total, count = picked.fold(*folds, scale=scale, row_bias=bias).rows
        return _reduced(loss=total.masked_fill(alone, 0.0).sum() / count.detach().sum().clamp_min(1.0))


class MultiSimilarityLoss(_PairLoss, losses.MultiSimilarityLoss):
    """`pytorch_metric_learning.losses.MultiSimilarityLoss` without a matrix of similarities or of pairs.

    Equivalent to: see `contrastive_ops.losses.multi_similarity`, one loss a row, which the reducer gets. With
    `MultiSimilarityMiner` of this module its pairs are bounds of the sweep.

    Args:
        alpha: sharpness of the positives.
        beta: sharpness of the negatives.
        base: the similarity that positives should exceed and negatives stay below.
        **kwargs: as of the original, which runs with a distance that is no inner product and with pairs from other
            miners than those of this module.
    """

    def of_all_pairs(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """The loss of all pairs."""
        arguments = self._arguments(embeddings, labels, ref_emb, ref_labels)
        factors = {"alpha": self.alpha, "beta": self.beta, "base": self.base}
        return _of_rows(multi_similarity(**arguments, **factors, reduction="none"))

    def folded(self, picked: Picked) -> Any:
        """The loss of the pairs that rules pick."""
        alpha, beta = float(self.alpha), float(self.beta)
        pull = Fold("logsumexp", alpha, picked.positives, negate=True)
        pulled, pushed = picked.fold(pull, Fold("logsumexp", beta, picked.negatives)).rows
        return _of_rows(softplus(pulled + alpha * self.base) / alpha + softplus(pushed - beta * self.base) / beta)


class ContrastiveLoss(_PairLoss, losses.ContrastiveLoss):
    """`pytorch_metric_learning.losses.ContrastiveLoss` of similarities, without a matrix of them or of pairs.

    Equivalent to, with the reducers of the package::

        pos_loss = F.relu(pos_margin - s[positives]); pos_loss[pos_loss > 0].mean()
        neg_loss = F.relu(s[negatives] - neg_margin); neg_loss[neg_loss > 0].mean()

    Args:
        pos_margin: the similarity that positives should exceed.
        neg_margin: the similarity that negatives should stay below.
        **kwargs: as of the original, which runs with a distance that is no inner product (its default is none), with
            other reducers than `AvgNonZeroReducer` and `MeanReducer`, and with pairs from other miners than those of
            this module.
    """

    def unfused(self) -> str:
        """Say which option has no fused form."""
        several = hasattr(self.reducer, "reducers")
        known = {type(each) for each in self.reducer.reducers.values()} if several else {type(self.reducer)}
        unknown = known - {reducers.AvgNonZeroReducer, reducers.MeanReducer}
        return f"reducer={unknown.pop().__name__}" if unknown else ""

    def of_all_pairs(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """The loss of all pairs; of few from their matrix, which costs less than the way to a sweep."""
        few = len(embeddings) * len(ref_emb) <= FEW_PAIRS and embeddings.dtype == ref_emb.dtype == torch.float32
        if not few or torch.is_autocast_enabled(embeddings.device.type) or type(self.reducer) is reducers.MeanReducer:
            return super().of_all_pairs(embeddings, labels, ref_emb, ref_labels)
        reducer = getattr(self.reducer, "reducers", {})
        if any(type(each) is reducers.MeanReducer for each in reducer.values()):
            return super().of_all_pairs(embeddings, labels, ref_emb, ref_labels)
        unit = F.normalize if self.distance.normalize_embeddings else lambda rows: rows
        x = unit(embeddings)
        logits = x @ (x if ref_emb is embeddings else unit(ref_emb)).T
        positive = labels[:, None] == ref_labels
        negative = ~positive
        if ref_emb is embeddings and ref_labels is labels:
            positive.fill_diagonal_(False)
        sides = (
            ("pos_loss", float(self.pos_margin) - logits, positive),
            ("neg_loss", logits - float(self.neg_margin), negative),
        )
        values = {}
        for name, violation, taken in sides:
            hinges = violation.masked_fill(~(taken & (violation.detach() > 0)), 0.0)
            values[name] = hinges.sum() / hinges.detach().count_nonzero().clamp_min(1)
        return _reduced(**values)

    def folded(self, picked: Picked) -> Any:
        """The loss of the pairs that rules pick."""
        low, high = float(self.pos_margin), float(self.neg_margin)
        dtype = torch.promote_types(picked.given[0].dtype, torch.float32)
        pulled = _with_bound(picked.positives, "below", inside_number(low, -torch.inf, dtype))
        pushed = _with_bound(picked.negatives, "above", inside_number(high, torch.inf, dtype))
        folds: list[str | Fold] = ["sum", "count", *(Fold(name, pairs=pushed) for name in ("sum", "count"))]
        several = getattr(self.reducer, "reducers", dict.fromkeys(("pos_loss", "neg_loss"), self.reducer))
        of_all = [type(several[name]) is reducers.MeanReducer for name in ("pos_loss", "neg_loss")]
        if any(of_all):
            folds += [Fold("count", pairs=pairs) for pairs in (picked.positives, picked.negatives)]
        near, near_count, far, far_count, *numbers = picked.fold(*folds, pairs=pulled).rows
        sides = (("pos_loss", near, near_count, low), ("neg_loss", far, far_count, high))
        values = {}
        for at, (name, total, violating, margin) in enumerate(sides):
            count = violating.detach()
            number = (numbers[at].detach() if of_all[at] else count).sum().clamp_min(1)
            values[name] = torch.sub(total, count, alpha=margin).sum() / (number if at else -number)
        return _reduced(**values)


def _with_bound(pairs: Pairs, name: str, bound: float) -> Pairs:
    """The pairs with one more bound, which are those that a hinge counts."""
    known = getattr(pairs, name)
    return changed(pairs, **{name: bound if known is None else (known, bound)})


class TripletMarginLoss(losses.TripletMarginLoss):
    """`pytorch_metric_learning.losses.TripletMarginLoss` of the distances of its triplets alone.

    Equivalent to, for triplets (a, p, n) that a miner picked::

        F.relu(d(x[a], y[p]) - d(x[a], y[n]) + margin)                      # swap, smooth_loss: as in the original

    The matrix of the original is cheaper where there are many triplets, and is made there.

    Args:
        *args: as of the original.
        **kwargs: the same; the original runs without `indices_tuple` where `triplets_per_anchor` is "all".
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Return the losses of all triplets, as reducers take them."""
        drawn = indices_tuple is None
        if drawn and (labels is None or self.triplets_per_anchor == "all"):
            if labels is not None:
                runs_original(self, "triplets_per_anchor='all'")
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        picked = utils.convert_to_triplets(indices_tuple, labels, ref_labels, t_per_anchor=self.triplets_per_anchor)
        a, p, n = picked
        if not len(a) or len(a) * PAIRS_PER_TRIPLET > len(embeddings) * len(ref_emb) or self.distance.collect_stats:
            return super().compute_loss(embeddings, labels, picked, ref_emb, ref_labels)
        x = self.distance.maybe_normalize(embeddings)
        y = x if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        near, far = self._apart(x, a, y, p), self._apart(x, a, y, n)
        if self.swap:  # as in the original: rows of x have the numbers of the positives
            far = self.distance.smallest_dist(far, self._apart(x, p, y, n))
        violation = self.distance.margin(near, far) + self.margin
        rows = torch.nn.functional.softplus(violation) if self.smooth_loss else violation.relu()
        return {"loss": {"losses": rows, "indices": picked, "reduction_type": "triplet"}}

    def _apart(self, x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
        found: Tensor = self.distance.pairwise_distance(x.index_select(0, i), y.index_select(0, j))
        return found if self.distance.power == 1 else found**self.distance.power


class _MarginSoftmax:
    """What the losses of class prototypes share."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Return the losses of all rows, as reducers take them."""
        loss: Any = self
        plain = labels is not None and ref_emb is embeddings and not loss.collect_stats
        if not plain or type(loss.distance) is not distances.CosineSimilarity or loss.distance.power != 1:
            runs_original(loss, f"distance={type(loss.distance).__name__}" if plain else "collect_stats")
            original: Any = super()
            return original.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        loss.cast_types(embeddings.dtype, embeddings.device)
        function = arc_face if isinstance(loss, losses.ArcFaceLoss) else cos_face
        rows = function(
            embeddings, loss.W.t(), labels.long(), margin=float(loss.margin), scale=loss.scale, reduction="none"
        )
        if indices_tuple is not None:
            rows = rows * utils.convert_to_weights(indices_tuple, labels, dtype=rows.dtype)
        indices = torch.arange(len(rows), device=rows.device)
        found = {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}
        loss.add_weight_regularization_to_loss_dict(found, loss.W.t())
        return found


class ArcFaceLoss(_MarginSoftmax, losses.ArcFaceLoss):
    """`pytorch_metric_learning.losses.ArcFaceLoss` without the N x C cosines; see `contrastive_ops.losses.arc_face`.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: in degrees.
        scale: factor of the cosines.
        **kwargs: as of the original.
    """


class CosFaceLoss(_MarginSoftmax, losses.CosFaceLoss):
    """`pytorch_metric_learning.losses.CosFaceLoss` without the N x C cosines; see `contrastive_ops.losses.cos_face`.

    Args:
        *args: num_classes (C) and embedding_size (D).
        margin: taken from the cosine of the own class.
        scale: factor of the cosines.
        **kwargs: as of the original.
    """


def __getattr__(name: str) -> Any:
    return getattr(miners if hasattr(miners, name) else losses, name)
