"""Neighbours by margins: cosines less, or over, those of both sides' neighbourhoods, so that hubs are nobody's best."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..ops.similarity_topk import TopK, similarity_topk


@torch.no_grad()
def csls(x: Tensor, y: Tensor, k: int = 1, *, neighbors: int = 10, backend: str = "auto") -> TopK:
    """Cross-domain similarity local scaling: the columns of the largest cosines less those of both neighbourhoods.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(y).T
        near_x, near_y = s.topk(neighbors, 1).values.mean(1), s.topk(neighbors, 0).values.mean(0)
        (2 * s - near_x[:, None] - near_y).topk(k, 1)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64, such as words of one language. A constant.
        y: (M, D) of the same dtype, of the other.
        k: how many columns for each row.
        neighbors: how many rows of the other side are a neighbourhood; all where there are fewer.
        backend: as in `similarity_topk`.

    Returns:
        `TopK` of the scores, which lie in [-4, 4] and have no gradient. Of all columns, not of a row's neighbours.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_topk`.

    Note:
        Three searches of 2 N M D; memory that of `similarity_topk`. A pair is mutual where
        ``csls(y, x).indices[csls(x, y).indices[:, 0], 0]`` is the row itself.

    Source:
        Conneau et al., Word Translation Without Parallel Data, 2018.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.5]])
        >>> csls(x, x.flip(0), neighbors=1).indices[:, 0]
        tensor([1, 0])
    """
    near_x, near_y = _neighborhoods("csls", x, y, neighbors, backend)
    of_x, of_y = -_means(near_x), -_means(near_y)
    x, y = x.detach(), y.detach()
    return similarity_topk(x, y, k, metric="cosine", scale=2.0, row_bias=of_x, col_bias=of_y, backend=backend)


@torch.no_grad()
def ratio_margin(x: Tensor, y: Tensor, k: int = 1, *, neighbors: int = 4, backend: str = "auto") -> TopK:
    """Ratio margin: of each row's neighbours those whose cosine is largest over the mean of both neighbourhoods.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(y).T
        near_x, near_y = s.topk(neighbors, 1).values.mean(1), s.topk(neighbors, 0).values.mean(0)
        ratio = 2 * s / (near_x[:, None] + near_y)
        ratio.gather(1, s.topk(neighbors, 1).indices).sort(1, descending=True)              # the first k of them

    Args:
        x: (N, D) float32, bfloat16, float16 or float64, such as sentences of one language. A constant.
        y: (M, D) of the same dtype, of the other.
        k: how many columns for each row, at most ``neighbors``.
        neighbors: how many rows of the other side are a neighbourhood, and a row's candidates; all where there are
            fewer.
        backend: as in `similarity_topk`.

    Returns:
        `TopK` of the ratios, without a gradient. Pairs above a threshold, 1.06 in the paper, are taken for
        translations.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_topk`; k above ``neighbors``.

    Note:
        Two searches of 2 N M D; memory that of `similarity_topk` for ``neighbors`` columns.

    Source:
        Artetxe and Schwenk, Margin-based Parallel Corpus Mining with Multilingual Sentence Embeddings, 2019.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> ratio_margin(x, x.roll(1, 0), neighbors=2).indices[:, 0]
        tensor([1, 2, 0])
    """
    name = "ratio_margin"
    neighbors = checks.integer(name, "neighbors", neighbors, 1)
    k = checks.integer(name, "k", k, 1, neighbors)
    near_x, near_y = _neighborhoods(name, x, y, neighbors, backend)
    there = near_x.indices >= 0
    if not len(y):
        return TopK(near_x.values[:, :k], near_x.indices[:, :k], near_x.counts)
    means = _means(near_x)[:, None] + _means(near_y)[near_x.indices.clamp_min(0)]
    ratio = (2 * near_x.values / means).masked_fill(~there, -torch.inf)
    ratio, order = ratio.sort(dim=1, descending=True, stable=True)
    return TopK(ratio[:, :k], near_x.indices.gather(1, order)[:, :k], near_x.counts.clamp_max(k))


def _neighborhoods(function: str, x: Tensor, y: Tensor, neighbors: int, backend: str) -> tuple[TopK, TopK]:
    """The neighbours of each row among those of the other side."""
    checks.check_matrices(function, "x", x, "y", y)
    neighbors = checks.integer(function, "neighbors", neighbors, 1)
    x, y = x.detach(), y.detach()
    of_x = similarity_topk(x, y, neighbors, metric="cosine", backend=backend)
    return of_x, similarity_topk(y, x, neighbors, metric="cosine", backend=backend)


def _means(near: TopK) -> Tensor:
    """Mean cosine of each row with its neighbours; 0 where there are none."""
    return near.values.masked_fill(near.indices < 0, 0.0).sum(1) / near.counts.clamp_min(1)
