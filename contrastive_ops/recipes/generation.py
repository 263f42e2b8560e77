"""Recipes of decoding and of comparing texts: ranks of continuations, consensus, differences. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses._columns import wide
from ..losses._sweep import Sweep
from ..ops import Pairs, TopK, similarity_topk


@torch.no_grad()
def rank_continuations(prefix: Tensor, suffixes: Tensor, keep: int = 2) -> TopK:
    """RankGen: the continuations of a prefix with the largest raw inner products.

    Equivalent to::

        (prefix @ suffixes.T).topk(keep, 1)

    Args:
        prefix: (N, D); suffixes: (M, D), 20 of 2 beams in the paper.
        keep: beams.
        suffixes: (M, D) continuations.

    Source:
        Krishna et al., RankGen, 2022 (S109); released code. Training is
        ``info_nce(prefix, continuation, generated, temperature=1.0, normalize=False)``.
    """
    return similarity_topk(prefix, suffixes, keep)


@torch.no_grad()
def consensus(candidates: Tensor) -> Tensor:
    """The candidate that resembles all others most: 0-d index.

    Equivalent to::

        (F.normalize(c) @ F.normalize(c).T).fill_diagonal_(0).sum(1).argmax()

    Args:
        candidates: (N, D); features of several similarities stand side by side, each scaled by the root of its weight.

    Source:
        Crowd sampling as used by VTechAGP, 2024 (S108), whose scores are not known exactly.
    """
    sweep = Sweep(("consensus", "candidates", "candidates"), 1.0, Pairs(diagonal=0))
    (sums,) = sweep.fold(wide(candidates, True), None, "sum").rows
    return sums.argmax()


@torch.no_grad()
def token_differences(
    x: Tensor, y: Tensor, documents: Tensor | None = None, other_documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DiffAlign: how far each token is from the nearest one of the other document.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(y).T               # of one pair of documents
        1 - s.amax(1), 1 - s.amax(0)

    Args:
        x: (T, D) and (T', D) tokens, of one pair of documents or of many.
        y: as `x`.
        documents: (T,) and (T',) int64 which pair each token is of.
        other_documents: as `documents`.

    Returns:
        (T,) and (T',) in [0, 2]; inf for a token whose pair has no token on the other side.

    Source:
        Vamvas and Sennrich, Towards Unsupervised Recognition of Semantic Differences in Related Documents, 2023 (S068).
    """
    pairs = None if documents is None or other_documents is None else Pairs(same=(documents, other_documents))
    sweep = Sweep(("token_differences", "x", "y"), 1.0, pairs)
    found = sweep.fold(wide(x, True), wide(y, True), "max", dim=(0, 1))
    return 1 - found.rows[0], 1 - found.cols[0]
