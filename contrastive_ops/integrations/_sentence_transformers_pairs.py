"""sentence-transformers' losses of scored pairs and of lists of candidates, and what sparse encoders use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import angle, cosent, listwise_distillation, margin_mse
from ._originals import runs_original, third_party

INSTALL = "'sentence-transformers>=6'"
third_party("sentence_transformers", INSTALL)
losses = third_party("sentence_transformers.sentence_transformer.losses", INSTALL)
sparse = third_party("sentence_transformers.sparse_encoder.losses", INSTALL)
util = third_party("sentence_transformers.util", INSTALL)

# Similarities of partners that are inner products, and whether of rows of length 1.
NORMALIZED = {util.pairwise_cos_sim: True, util.pairwise_dot_score: False}


class CoSENTLoss(losses.CoSENTLoss):
    """`CoSENTLoss`; see `contrastive_ops.losses.cosent`.

    Args:
        *args: see `sentence_transformers.losses.CoSENTLoss`.
        **kwargs: the same; with another `similarity_fct` than cosine, dot product and angle the original runs.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of (N, D) embeddings of both sides and (N,) labels."""
        function = self.similarity_fct
        angles = function is util.pairwise_angle_sim
        fused = angles or function in NORMALIZED
        if not fused or labels.numel() != len(embeddings[0]) or embeddings[0].is_sparse:
            if not fused:
                runs_original(self, f"similarity_fct={util.similarity_fct_name(function)}")
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return loss
        x, y, labels = embeddings[0], embeddings[1], labels.view(-1)
        if angles:
            return angle(x, y, labels, scale=self.scale)
        return cosent(x, y, labels, scale=self.scale, normalize=NORMALIZED[function])


class AnglELoss(losses.AnglELoss, CoSENTLoss):
    """`AnglELoss`; see `contrastive_ops.losses.angle`."""


class SparseCoSENTLoss(sparse.SparseCoSENTLoss, CoSENTLoss):
    """`SparseCoSENTLoss` on `CoSENTLoss` of this module."""


class SparseAnglELoss(sparse.SparseAnglELoss, CoSENTLoss):
    """`SparseAnglELoss` on `CoSENTLoss` of this module."""


def _scores(loss: Any, embeddings: list[Tensor]) -> Tensor | None:
    """(N, K) similarities of queries and of each of their K documents; None where the original has to run."""
    if loss.similarity_fct not in NORMALIZED or any(each.is_sparse for each in embeddings):
        runs_original(loss, f"similarity_fct={util.similarity_fct_name(loss.similarity_fct)}")
        return None
    query, *documents = embeddings
    if NORMALIZED[loss.similarity_fct]:
        query = torch.nn.functional.normalize(query)
        documents = [torch.nn.functional.normalize(each) for each in documents]
    return torch.stack([torch.linalg.vecdot(query, each) for each in documents], 1)


class MarginMSELoss(losses.MarginMSELoss):
    """`MarginMSELoss`; see `contrastive_ops.losses.margin_mse`.

    Args:
        *args: see `sentence_transformers.losses.MarginMSELoss`.
        **kwargs: the same; with another `similarity_fct` than cosine and dot product the original runs.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of queries, positives and negatives, (N, D) each, and of scores or margins of a teacher."""
        rows, negatives = len(embeddings[0]), len(embeddings) - 2
        known = labels.shape in ((rows, negatives + 1), (rows, negatives)) or labels.shape == (rows,) and negatives == 1
        scores = _scores(self, embeddings) if known else None
        if scores is None:
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return loss
        teacher = labels.detach().to(scores.dtype)
        if labels.shape != (rows, negatives + 1):  # margins are scores where the positive has 0
            teacher = torch.nn.functional.pad(-teacher.view(rows, negatives), (1, 0))
        return margin_mse(scores, teacher)


class SparseMarginMSELoss(sparse.SparseMarginMSELoss, MarginMSELoss):
    """`SparseMarginMSELoss` on `MarginMSELoss` of this module."""


class DistillKLDivLoss(losses.DistillKLDivLoss):
    """`DistillKLDivLoss`; see `contrastive_ops.losses.listwise_distillation`.

    Args:
        *args: see `sentence_transformers.losses.DistillKLDivLoss`.
        **kwargs: the same; with another `similarity_fct` than cosine and dot product the original runs.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of queries and K documents, (N, D) each, and (N, K) scores of a teacher."""
        # The original looks once at the scale of the teacher's scores, and at shapes.
        first = not self._checked_teacher_scale or labels.shape != (len(embeddings[0]), len(embeddings) - 1)
        scores = None if first else _scores(self, embeddings)
        if scores is None:
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return loss
        temperatures = {"temperature": self.student_temperature, "teacher_temperature": self.teacher_temperature}
        return listwise_distillation(scores, labels.detach().to(scores.dtype), **temperatures)


class SparseDistillKLDivLoss(sparse.SparseDistillKLDivLoss, DistillKLDivLoss):
    """`SparseDistillKLDivLoss` on `DistillKLDivLoss` of this module."""


class FlopsLoss(sparse.FlopsLoss):
    """`FlopsLoss` whose rows of too few numbers are left out without a copy of the others.

    Equivalent to::

        kept = (embeddings != 0).sum(1) > threshold
        (embeddings * kept[:, None]).mean(0).square().sum()
    """

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return the loss of (N, D) embeddings."""
        if self.threshold is None or embeddings.is_sparse:
            loss: Tensor = super().compute_loss_from_embeddings(embeddings)
            return loss
        kept = embeddings.detach().count_nonzero(1) > self.threshold
        return (kept.to(embeddings.dtype) / len(embeddings) @ embeddings).square().sum()


class SpladeLoss(sparse.SpladeLoss):
    """`SpladeLoss` with `FlopsLoss` of this module where the original has its own.

    Args:
        *args: see `sentence_transformers.sparse_encoder.losses.SpladeLoss`.
        **kwargs: the same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("document_regularizer", "query_regularizer"):
            found: Any = getattr(self, name, None)
            if type(found) is sparse.FlopsLoss:
                setattr(self, name, FlopsLoss(found.model, found.threshold))
