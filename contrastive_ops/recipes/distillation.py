"""Recipes of teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..losses import similarity_distillation


def static_embedding_kd(x: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Static word embeddings: cross-entropy of the batch's similarities between a teacher and a sum of word vectors.

    Equivalent to::

        s = lambda z: (F.normalize(z) @ F.normalize(z).T / temperature).fill_diagonal_(-torch.inf)
        -(s(teacher).softmax(1) * s(x).log_softmax(1).nan_to_num(neginf=0.0)).sum(1).mean()

    Args:
        x: (N, D) sums of word vectors.
        teacher: (N, D') of the same sentences.
        temperature: divides the cosines.

    Source:
        Static Word Embeddings for Sentence Semantic Representation, 2025 (S043); released code. The cross-lingual loss
        is ``2 * clip(x, y, temperature=0.05)``.
    """
    return similarity_distillation(x, None, teacher, divergence="ce", temperature=temperature)


def ranksyn_targets(similarity: Tensor, *, omega: float = 0.5) -> Tensor:
    """RankSyn's targets: a teacher's similarities, corrected by the order in which sentences were generated.

    Equivalent to::

        for i in range(n):
            ordered = similarity[i, i:].sort(descending=True).values
            for j in range(i, n):
                rank = how many of similarity[i, i:] are above similarity[i, j]
                b = abs(similarity[i, j] - ordered[j - i]) * (-1 if rank < j else 1)
                target[i, j] = similarity[i, j] + sign(b) * log(omega * abs(b) + 1)         # and target[j, i] with b

    Args:
        similarity: (n, n) the teacher's cosines over its temperature, of sentences from nearest to farthest.
        omega: 0.5.

    Returns:
        (n, n) for ``listwise_distillation(cosines, targets, kind="listmle", temperature=0.05)``.

    Source:
        Refining Sentence Embedding Model through Ranking Sentences Generation, 2025 (S067); released code, which
        compares ranks from row i on with columns from 0 on.
    """
    checks.check_matrix("ranksyn_targets", "similarity", similarity)
    size = similarity.shape[0]
    place = torch.arange(size, device=similarity.device)
    upper = similarity.masked_fill(place[:, None] > place, -torch.inf)
    ordered, order = upper.sort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    expected = ordered.gather(1, (place - place[:, None]).clamp_min(0))
    correction = (similarity - expected).abs() * torch.where(rank < place, -1.0, 1.0)
    correction = correction.triu() + correction.triu(1).T
    return similarity + correction.sign() * (omega * correction.abs()).log1p()
