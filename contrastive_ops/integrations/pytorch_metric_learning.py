"""pytorch-metric-learning's losses on fused kernels.

    from contrastive_ops.integrations.pytorch_metric_learning import ArcFaceLoss, SupConLoss

    loss = SupConLoss(temperature=0.1)(embeddings, labels)

Reducers, regularisers and wrappers of the package work as before. What a miner picks is a list of pairs: with
`indices_tuple` the pair losses are the original ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import arc_face, cos_face, multi_positive_info_nce, sup_con
from ._originals import runs_original, third_party

INSTALL = "pytorch-metric-learning"
losses = third_party("pytorch_metric_learning.losses", INSTALL)
distances = third_party("pytorch_metric_learning.distances", INSTALL)
reducers = third_party("pytorch_metric_learning.reducers", INSTALL)
utils = third_party("pytorch_metric_learning.utils.loss_and_miner_utils", INSTALL)

# Similarities that are inner products.
PRODUCTS = (distances.CosineSimilarity, distances.DotProductSimilarity)


def _unfused(loss: Any, labels: Tensor | None, indices_tuple: Any) -> str:
    """Say what has no fused form; empty where all has."""
    distance = loss.distance
    if indices_tuple is not None:
        return "indices_tuple"
    if type(distance) not in PRODUCTS or distance.p != 2 or distance.power != 1 or distance.collect_stats:
        return f"distance={type(distance).__name__}"
    if labels is not None and labels.is_floating_point():
        return f"labels of {labels.dtype}"
    return ""


def _classes(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as numbers from 0 on, because -1 is a class here and no label there."""
    lowest = labels.new_zeros(()) if not labels.numel() else torch.minimum(labels.min(), ref_labels.min())
    return (labels - lowest).long(), (ref_labels - lowest).long()


class _PairLoss:
    """What the pair losses share: arguments as the primitives take them."""

    def _arguments(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> dict[str, Any]:
        rows, columns = _classes(labels, ref_labels)
        loss: Any = self
        arguments = {"x": embeddings, "labels": rows, "temperature": loss.temperature}
        if ref_emb is not embeddings or ref_labels is not labels:
            arguments |= {"y": ref_emb, "col_labels": columns}
        return arguments | {"normalize": loss.distance.normalize_embeddings}


class SupConLoss(_PairLoss, losses.SupConLoss):
    """`pytorch_metric_learning.losses.SupConLoss` without a matrix of similarities or of pairs.

    Equivalent to: see `contrastive_ops.losses.sup_con`, one loss a row, which the reducer gets.

    Args:
        temperature: divides the similarities.
        **kwargs: `distance`, `reducer`, `embedding_regularizer`, ...; the original runs with a distance that is no
            inner product and with pairs that a miner picked.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Return the losses of all rows, as reducers take them."""
        if reason := _unfused(self, labels, indices_tuple):
            runs_original(self, reason)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if not labels.numel() or not (labels[:1] != ref_labels).any() and not (labels != labels[:1]).any():
            return self.zero_losses()  # one class: there are no negatives, and the original says 0
        arguments = self._arguments(embeddings, labels, ref_emb, ref_labels)
        rows = sup_con(**arguments, reduction="none")
        indices = torch.arange(len(rows), device=rows.device)
        return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}


class NTXentLoss(_PairLoss, losses.NTXentLoss):
    """`pytorch_metric_learning.losses.NTXentLoss` without a matrix of similarities or of pairs.

    Equivalent to: see `contrastive_ops.losses.multi_positive_info_nce` with ``mean_over="pairs"``. Probabilities below
    1e-7 keep their digits, where the original stops.

    Args:
        temperature: divides the similarities.
        **kwargs: `distance`, `reducer`, `embedding_regularizer`, ...; the original runs with a distance that is no
            inner product, with a reducer that is no mean of all pairs, and with pairs that a miner picked.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Return the mean over all positive pairs, as reducers take it."""
        reason = _unfused(self, labels, indices_tuple)
        if not reason and type(self.reducer) is not reducers.MeanReducer:
            reason = f"reducer={type(self.reducer).__name__}"
        if reason:
            runs_original(self, reason)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if not labels.numel():
            return self.zero_losses()
        arguments = self._arguments(embeddings, labels, ref_emb, ref_labels)
        loss = multi_positive_info_nce(**arguments, mean_over="pairs")
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


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
    return getattr(losses, name)
