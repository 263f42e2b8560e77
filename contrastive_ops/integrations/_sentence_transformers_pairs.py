"""sentence-transformers' loss of scored pairs, and what sparse encoders use.

AnglELoss, MarginMSELoss and DistillKLDivLoss make no matrix of pairs, and nothing of theirs is faster here: these are
the original classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..losses import cosent
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
        **kwargs: the same; with another `similarity_fct` than cosine and dot product the original runs.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of (N, D) embeddings of both sides and (N,) labels."""
        function = self.similarity_fct
        fused = function in NORMALIZED
        if not fused or labels.numel() != len(embeddings[0]) or embeddings[0].is_sparse:
            if not fused:
                runs_original(self, f"similarity_fct={util.similarity_fct_name(function)}")
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return loss
        x, y = embeddings[:2]
        return cosent(x, y, labels.view(-1), scale=self.scale, normalize=NORMALIZED[function])


class SparseCoSENTLoss(sparse.SparseCoSENTLoss, CoSENTLoss):
    """`SparseCoSENTLoss` on `CoSENTLoss` of this module."""


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
