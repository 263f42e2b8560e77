"""PyLate's losses with MaxSim that never makes a matrix of tokens against tokens.

    from contrastive_ops.integrations.pylate import Contrastive

    loss = Contrastive(model)

The losses are PyLate's own; their `score_metric` is that of this module where none is given. Scores are float32 numbers
of rows of any precision, a token that is masked is the best one of no query token, and a document without tokens has
score 0.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ..ops import TokenSets, maxsim, maxsim_pairs
from ._originals import runs_original, third_party

losses = third_party("pylate.losses", "pylate")
scores = third_party("pylate.scores", "pylate")

__all__ = ["CachedContrastive", "ColBERTScores", "Contrastive", "Distillation", "colbert_kd_scores"]


def _runs_elsewhere(name: str, embeddings: tuple[Any, Any], backend: str | None) -> bool:
    """Whether the original is to run: of what is no tensor, or where another implementation is asked for by name."""
    if not all(isinstance(each, Tensor) for each in embeddings):
        return True
    asked = (backend or os.environ.get("PYLATE_SCORES_BACKEND", "auto")).lower()
    if asked != "auto":
        runs_original(name, f"backend={asked!r}")
    return asked != "auto"


def _sets(tokens: Tensor, mask: Tensor | None) -> TokenSets:
    return TokenSets(tokens, None if mask is None else mask.bool())


def _of_empty(found: Tensor) -> Tensor:
    return found.masked_fill(found == -torch.inf, 0.0)


class ColBERTScores(scores.ColBERTScores):
    """`pylate.scores.ColBERTScores`: the scores of all queries and all documents of all groups, of one call.

    Equivalent to::

        similarity = torch.einsum("qah,dnbh->qdnab", queries, documents)
        similarity = similarity.masked_fill(~documents_mask[None, :, :, None], -torch.inf)
        similarity.amax(4).masked_fill(~queries_mask[:, None, None], 0.0).sum(3).flatten(1)    # (Q, D n)
    """

    def __call__(  # noqa: D102, PLR0917 - the original's own arguments
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        given = queries_embeddings, documents_embeddings
        if _runs_elsewhere("ColBERTScores", given, backend):
            found: Tensor = super().__call__(*given, queries_mask, documents_mask, backend)
            return found
        mask = None if documents_mask is None else documents_mask.flatten(0, 1)
        documents = _sets(documents_embeddings.flatten(0, 1), mask)
        return _of_empty(maxsim(_sets(queries_embeddings, queries_mask), documents))


@functools.wraps(scores.colbert_kd_scores)
def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`pylate.scores.colbert_kd_scores`: the scores of each query with its own (N, K, L, D) documents."""
    given = queries_embeddings, documents_embeddings
    if _runs_elsewhere("colbert_kd_scores", given, backend):
        found: Tensor = scores.colbert_kd_scores(*given, queries_mask, documents_mask, backend)
        return found
    queries = _sets(queries_embeddings, queries_mask)
    return _of_empty(maxsim_pairs(queries, _sets(documents_embeddings, documents_mask)))


class _Scored:
    """What the losses share: whose scores they take."""

    score_metric: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.score_metric) is scores.ColBERTScores:
            self.score_metric = ColBERTScores()
        elif self.score_metric is scores.colbert_kd_scores:
            self.score_metric = colbert_kd_scores
        elif self.score_metric is not colbert_kd_scores and not isinstance(self.score_metric, ColBERTScores):
            metric = self.score_metric
            runs_original(type(self).__name__, f"score_metric={getattr(metric, '__name__', type(metric).__name__)}")


class Contrastive(_Scored, losses.Contrastive):
    """`pylate.losses.Contrastive` on `ColBERTScores` of this module.

    Args:
        *args: as of the original.
        **kwargs: the same; another `score_metric` runs as it is.
    """


class CachedContrastive(_Scored, losses.CachedContrastive):
    """`pylate.losses.CachedContrastive` on `ColBERTScores` of this module.

    Args:
        *args: as of the original.
        **kwargs: the same; another `score_metric` runs as it is.
    """


class Distillation(_Scored, losses.Distillation):
    """`pylate.losses.Distillation` on `colbert_kd_scores` of this module.

    Args:
        *args: as of the original.
        **kwargs: the same; another `score_metric` runs as it is.
    """


def __getattr__(name: str) -> Any:
    return getattr(losses, name)
